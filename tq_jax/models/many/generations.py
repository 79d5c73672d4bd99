"""The host loop of `generate_many`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import jax

import tq_jax as tq
from tq_jax.attention import Implementation
from tq_jax.models.checks import require_key, require_positive, require_stop_tokens
from tq_jax.models.decoder import Decoder
from tq_jax.models.many.device import Device, Flight, Plan
from tq_jax.models.many.requests import Finished, Request, make_requests
from tq_jax.models.many.tally import Bar, Tally
from tq_jax.models.sampling import Sampling

IN_FLIGHT = 2
"""Calls that the device has at a time: while it runs one, the host reads the one before and hands over the next."""


class ManyGenerations:
    """The prompts of a `generate_many`: an iterator over those that are done, in the order in which they end.

    Each `next` runs the device until a prompt is done; the device goes on while the caller looks at it. The host hands
    over a call before it reads the one before: that a prompt ends by its number of tokens is known beforehand, so the
    next one takes its row at once; a stop token is seen one call late. Every prompt is yielded once, cancelled ones
    too. If the caller, its progress function or the device raises, iteration can go on: results are kept, and after an
    error of the device the prompts that ran start again, with the same tokens. `with` closes at the end of the block.

    Attributes:
        results: What has been done so far, by the index of the prompt, whether it has been yielded or not.
    """

    def __init__(self, plan: Plan, requests: list[Request], progress: Callable[[Tally], None] | None):
        self.results: dict[int, Finished] = {}
        self._plan, self._requests, self._progress = plan, requests, progress
        self._waiting: deque[Request] = deque(sorted(requests, key=_precedence))
        self._ready: deque[Finished] = deque()
        self._steps = self._used = self._tokens = 0
        self._forget()
        # Made now, so that a spec of another model is refused by `generate_many`.
        self._device: Device | None = Device(plan)

    def __iter__(self) -> Iterator[Finished]:
        return self

    def __next__(self) -> Finished:
        while not self._ready:
            if not self._waiting and not self._running:
                self.close()
                raise StopIteration
            self._advance()
        return self._ready.popleft()

    def __enter__(self) -> ManyGenerations:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    @property
    def tally(self) -> Tally:
        """Counts so far."""
        return Tally(
            prompts=len(self._requests),
            finished=len(self.results),
            running=len(self._running),
            new_tokens=self._tokens,
            steps=self._steps,
            row_steps=self._steps * self._plan.rows,
            used_row_steps=self._used,
        )

    def collect(self) -> list[Finished]:
        """Run all prompts.

        Returns:
            The results in the order of the prompts, those that have been yielded included.

        Raises:
            ValueError: If the generation was closed before all prompts were done.
        """
        for _ in self:
            pass
        missing = [request.index for request in self._requests if request.index not in self.results]
        if missing:
            raise ValueError(f"expected all prompts to be done, got a closed generation without prompts {missing}")
        return [self.results[request.index] for request in self._requests]

    def cancel(self, index: int) -> bool:
        """End a prompt that waits or runs; the next prompt takes its row.

        Args:
            index: Index of the prompt.

        Returns:
            Whether it was still to be done. It is then yielded with the tokens that have been read, and the reason
            "cancelled".

        Raises:
            ValueError: If there is no such prompt.
        """
        if not 0 <= index < len(self._requests):
            raise ValueError(f"index: expected a prompt from 0 to {len(self._requests) - 1}, got {index}")
        request = self._requests[index]
        if request.over:
            return False
        self._settle(request, request.finish("cancelled"))
        return True

    def close(self) -> None:
        """End all prompts that are not done and free the cache. `results` stays; iteration is over."""
        for request in self._requests:
            request.over = True
        self._waiting.clear()
        self._ready.clear()
        self._forget()
        self._close_bar()

    def _close_bar(self) -> None:
        if isinstance(self._progress, Bar):
            self._progress.close()

    def _forget(self) -> None:
        """Drop what is on the device."""
        self._owners: list[Request | None] = [None] * self._plan.rows
        self._running: set[Request] = set()
        self._flights: deque[Flight] = deque()
        self._device = None

    def _settle(self, request: Request, finished: Finished) -> None:
        """Keep a result, and free the prompt's row or its place in the queue."""
        self.results[finished.index] = finished
        self._ready.append(finished)
        if request not in self._running:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        # If it ended by its number of tokens, its row may have a new owner.
        if request in self._owners:
            self._owners[self._owners.index(request)] = None

    def _advance(self) -> None:
        """Read the oldest call of the device; others follow it before and after."""
        try:
            self._dispatch()
            self._read()
            self._dispatch()
        except BaseException:
            self._close_bar()
            self._restart()
            raise
        if self._progress is not None:
            self._progress(self.tally)

    def _restart(self) -> None:
        """Put the prompts that ran in front of the queue: an error may have taken the donated cache."""
        for request in self._running:
            request.restart()
        self._waiting.extendleft(sorted(self._running, key=_precedence, reverse=True))
        self._forget()

    def _dispatch(self) -> None:
        """Hand over calls until as many are in flight as may be, or all that is left ends in them."""
        while len(self._flights) < IN_FLIGHT:
            self._owners = [None if owner is None or owner.ends else owner for owner in self._owners]
            new: list[tuple[int, Request]] = []
            for row, owner in enumerate(self._owners):
                if owner is None and self._waiting:
                    request = self._waiting.popleft()
                    self._owners[row] = request
                    self._running.add(request)
                    new.append((row, request))
            if all(owner is None for owner in self._owners):
                return
            self._device = self._device or Device(self._plan)
            self._flights.append(self._device.start(self._owners, new))

    def _read(self) -> None:
        """Read the oldest call in flight and settle the prompts that are done, in the order of their steps."""
        flight = self._flights.popleft()
        done: list[tuple[int, Request, Finished]] = []
        for steps, request, drawn in flight.read():
            if request.over:  # by a stop token in the call before, or cancelled while the device ran
                continue
            self._tokens += len(drawn)
            self._used += steps
            if finished := request.take(drawn, self._plan.stop):
                done.append((steps, request, finished))
        self._steps += 0 if flight.out is None else self._plan.steps
        for _, request, finished in sorted(done, key=lambda entry: entry[0]):
            self._settle(request, finished)


def _precedence(request: Request) -> tuple[int, int]:
    """Requests with the most new tokens come first, so that few rows are left with long ones at the end."""
    return -request.limit, request.index


def generate_many(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    cache_spec: tq.CacheSpec,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    key: jax.Array | None = None,
    steps: int = 8,
    chunk: int = 4,
    progress: bool | Callable[[Tally], None] = False,
    implementation: Implementation = "auto",
    precise: bool = False,
) -> ManyGenerations:
    """Generate after more prompts than a cache has rows: a prompt that ends hands its row to the next one.

    Prompts that may draw most tokens start first, otherwise in their order, so that rows stay in use up to the end. Two
    programs are compiled: `steps` steps of decoding for all rows, and prompts into free rows, the latter for each
    padded length (powers of two) and number of prompts (powers of two up to `chunk`). Both change one cache in place. A
    prompt's tokens do not depend on its row nor on what runs beside it, but for rounding: those of prompt i are the
    tokens of `generate` for that prompt alone, with the key `jax.random.fold_in(key, i)`.

    Args:
        decoder: From `load_model` or `Decoder`.
        prompts: Token ids of each prompt.
        rows: Sequences that run at a time; the cache has `num_layers * rows` rows.
        cache_spec: Spec of the cache of one layer.
        max_new_tokens: Largest number of new tokens, for all prompts or per prompt.
        sampling: How tokens are drawn; None is greedy.
        stop_tokens: Ids that end a sequence; `decoder.config.stop_tokens` for a chat.
        key: Random key; required unless sampling is greedy. The same key draws the same tokens.
        steps: Steps between two looks of the host at the tokens, of which a row that ends idles half on average. The
            device waits for the host only if they take less time than the host needs for a call, some milliseconds.
        chunk: Largest number of prompts of one prefill; it bounds memory and the number of compiled programs.
        progress: True shows a bar on standard error if that is a terminal; a function is called with a `Tally` after
            every look at the tokens.
        implementation: Implementation of attention, see `tq_jax.attend`.
        precise: Whether attention is precise, see `tq_jax.attend`.

    Returns:
        An iterator over `Finished`, in the order in which prompts end. Nothing runs before the first `next`.

    Raises:
        ValueError: If a prompt is empty, has ids outside the vocabulary, or exceeds with its continuation the cache or
            the model's context (the message names its index); if the spec is of another model, sampling lacks a key, or
            a number is out of range.

    Example:
        >>> from flax import nnx
        >>> from tq_jax.models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48)
        >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
        >>> spec = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=8, max_tokens=32, dtype="float32")
        >>> many = generate_many(decoder, [[1, 2, 3], [4], [5, 6]], rows=2, cache_spec=spec, max_new_tokens=[9, 2, 4])
        >>> [(done.index, len(done.tokens), done.reason) for done in many]
        [(2, 4, 'length'), (0, 9, 'length'), (1, 2, 'length')]
        >>> [len(done.tokens) for done in many.collect()]
        [9, 2, 4]
    """
    require_positive(rows=rows, steps=steps, chunk=chunk)
    sampling = Sampling() if sampling is None else sampling
    require_stop_tokens(stop_tokens, decoder.config)
    requests = make_requests(decoder, prompts, cache_spec, max_new_tokens)
    plan = Plan(
        decoder=decoder,
        cache_spec=cache_spec,
        rows=rows,
        steps=steps,
        chunk=chunk,
        stop=frozenset(int(token) for token in stop_tokens),
        key=require_key(key, sampling),
        sampling=sampling,
        implementation=implementation,
        precise=precise,
        longest=max((request.prompt.size for request in requests), default=1),
    )
    return ManyGenerations(plan, requests, (Bar() if progress is True else progress) or None)
