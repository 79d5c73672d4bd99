"""The host loop of `generate_many`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from tq_jax.attention import Implementation
from tq_jax.models.checks import require_key, require_positive, require_stop_tokens
from tq_jax.models.decoder import Decoder
from tq_jax.models.layer_caches import Caches
from tq_jax.models.many.requests import Finished, Request, bucket, make_requests
from tq_jax.models.many.steps import Batch, advance_rows, empty_rows, fill_rows
from tq_jax.models.many.tally import Bar, Tally
from tq_jax.models.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What stays the same during a generation, see `generate_many`."""

    decoder: Decoder
    cache_spec: tq.CacheSpec
    rows: int
    steps: int
    chunk: int
    refill: int
    stop: frozenset[int]
    key: jax.Array
    sampling: Sampling
    implementation: Implementation
    precise: bool
    longest: int


@dataclass(frozen=True)
class _Flight:
    """A call that has been handed to the device and not been read.

    Attributes:
        owners: The request of each row; None for a row without work.
        firsts: Requests that fill rows, and their first tokens.
        out: int32 [rows, steps], the tokens of the steps.
        ran: int32 [], number of steps.
    """

    owners: list[Request | None]
    firsts: list[tuple[list[Request], jax.Array]]
    out: jax.Array
    ran: jax.Array


class ManyGenerations:
    """The prompts of a `generate_many`: an iterator over those that are done, in the order in which they end.

    Each `next` runs the device until a prompt is done; the device goes on while the caller looks at it. Every prompt
    is yielded once, cancelled ones too. If the caller, its progress function or the device raises, iteration can go on:
    results are kept, and after an error of the device the prompts that ran start again, with the same tokens.
    `with` closes at the end of the block.

    Attributes:
        results: What has been done so far, by the index of the prompt, whether it has been yielded or not.
    """

    def __init__(self, plan: _Plan, requests: list[Request], progress: Callable[[Tally], None] | None):
        self.results: dict[int, Finished] = {}
        self._plan, self._requests, self._progress = plan, requests, progress
        self._waiting: deque[Request] = deque(requests)
        self._ready: deque[Finished] = deque()
        self._steps = self._used = self._tokens = 0
        # Padded with what is no token, so that few numbers of stop tokens have programs of their own.
        stop = sorted(plan.stop)
        self._stop = jnp.asarray(np.array(stop + [-1] * (8 - len(stop) % 8), np.int32))
        self._forget()
        # Made now, so that a spec of another model is refused by `generate_many`.
        self._cache: Caches | None = plan.decoder.init_cache(plan.cache_spec, batch=plan.rows)

    def __iter__(self) -> Iterator[Finished]:
        return self

    def __next__(self) -> Finished:
        while not self._ready:
            if not self._unfinished():
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
            running=sum(owner is not None for owner in self._owners),
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

    def _unfinished(self) -> bool:
        return bool(self._waiting) or any(owner is not None for owner in self._owners)

    def _forget(self) -> None:
        """Drop what is on the device."""
        self._owners: list[Request | None] = [None] * self._plan.rows
        self._rows = empty_rows(self._plan.rows)
        self._cache = None
        self._flight: _Flight | None = None

    def _settle(self, request: Request, finished: Finished) -> None:
        """Keep a result, and free the prompt's row or its place in the queue."""
        self.results[finished.index] = finished
        self._ready.append(finished)
        if request in self._owners:
            self._owners[self._owners.index(request)] = None
        else:
            self._waiting.remove(request)

    def _advance(self) -> None:
        """Read a call of the device and hand it the next one."""
        try:
            if self._flight is None:
                self._dispatch()
            self._read()
            if self._unfinished():
                self._dispatch()
        except BaseException:
            self._close_bar()
            self._restart()
            raise
        if self._progress is not None:
            self._progress(self.tally)

    def _restart(self) -> None:
        """Put the prompts that ran in front of the queue: an error may have taken the donated cache."""
        running = sorted((owner for owner in self._owners if owner is not None), key=lambda request: request.index)
        for request in running:
            request.tokens.clear()
        self._waiting.extendleft(reversed(running))
        self._forget()

    def _dispatch(self) -> None:
        """Fill the free rows with waiting prompts, and start the next steps."""
        plan = self._plan
        if self._cache is None:
            self._cache = plan.decoder.init_cache(plan.cache_spec, batch=plan.rows)
        new: list[tuple[int, Request]] = []
        for row, owner in enumerate(self._owners):
            if owner is None and self._waiting:
                self._owners[row] = self._waiting.popleft()
                new.append((row, self._owners[row]))  # pyright: ignore[reportArgumentType]
        firsts = [self._fill(group) for group in self._groups(new)]
        idle = np.array([owner is None for owner in self._owners])
        out, ran, self._rows, self._cache = advance_rows(
            plan.decoder,
            self._rows,
            self._cache,
            idle,
            np.int32(plan.refill if self._waiting else plan.rows),
            plan.key,
            self._stop,
            sampling=plan.sampling,
            steps=plan.steps,
            implementation=plan.implementation,
            precise=plan.precise,
        )
        self._flight = _Flight(list(self._owners), firsts, out, ran)

    def _groups(self, new: list[tuple[int, Request]]) -> Iterator[list[tuple[int, Request]]]:
        """Rows and their new requests, in groups of one padded length and at most `chunk` prompts."""
        lengths: dict[int, list[tuple[int, Request]]] = {}
        for row, request in new:
            lengths.setdefault(bucket(request.prompt.size, self._plan.longest), []).append((row, request))
        for group in lengths.values():
            for start in range(0, len(group), self._plan.chunk):
                yield group[start : start + self._plan.chunk]

    def _fill(self, group: list[tuple[int, Request]]) -> tuple[list[Request], jax.Array]:
        """Start the prefill of prompts of one padded length: their requests and first tokens."""
        plan = self._plan
        size = min(1 << (len(group) - 1).bit_length(), plan.chunk, plan.rows)
        taken = {row for row, _ in group}
        others = [row for row in range(plan.rows) if row not in taken]
        tokens = np.zeros((size, bucket(group[0][1].prompt.size, plan.longest)), np.int32)
        lengths, prompt, limit = np.zeros((3, size), np.int32)
        for i, (_, request) in enumerate(group):
            tokens[i, : request.prompt.size] = request.prompt
            lengths[i], prompt[i], limit[i] = request.prompt.size, request.index, request.limit
        rows = np.array([row for row, _ in group] + others[: size - len(group)], np.int32)
        batch = Batch(*(jnp.asarray(array) for array in (tokens, lengths, rows, prompt, limit)))
        first, self._rows, self._cache = fill_rows(
            plan.decoder, batch, self._rows, self._cache, plan.key, self._stop, sampling=plan.sampling
        )
        return [request for _, request in group], first

    def _read(self) -> None:
        """Read the tokens of the call in flight and settle the prompts that are done, in the order of their steps."""
        flight = self._flight
        assert flight is not None
        firsts, out, ran = jax.device_get(([first for _, first in flight.firsts], flight.out, flight.ran))
        self._flight = None
        self._steps += int(ran)
        done: list[tuple[int, Request, Finished]] = []

        def take(request: Request, drawn: list[int]) -> None:
            if request.over:  # cancelled while the device ran
                return
            self._tokens += len(drawn)
            if finished := request.take(drawn, self._plan.stop):
                done.append((len(drawn), request, finished))

        for (requests, _), tokens in zip(flight.firsts, firsts, strict=True):
            for request, token in zip(requests, tokens.tolist(), strict=False):
                take(request, [token])
        before = self._tokens
        for request, tokens in zip(flight.owners, out.tolist(), strict=True):
            if request is not None:
                take(request, [token for token in tokens if token >= 0])
        self._used += self._tokens - before
        for _, request, finished in sorted(done, key=lambda entry: entry[0]):
            self._settle(request, finished)


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
    steps: int = 16,
    chunk: int = 4,
    refill: int | None = None,
    progress: bool | Callable[[Tally], None] = False,
    implementation: Implementation = "auto",
    precise: bool = False,
) -> ManyGenerations:
    """Generate after more prompts than a cache has rows: a prompt that ends hands its row to the next one.

    Two programs are compiled: up to `steps` steps of decoding for all rows, and prompts into free rows, the latter for
    each padded length (powers of two) and number of prompts (powers of two up to `chunk`). Both change one cache in
    place. A prompt's tokens do not depend on its row nor on what runs beside it, but for rounding: those of prompt i
    are the tokens of `generate` for that prompt alone, with the key `jax.random.fold_in(key, i)`.

    Args:
        decoder: From `load_model` or `Decoder`.
        prompts: Token ids of each prompt.
        rows: Sequences that run at a time; the cache has `num_layers * rows` rows.
        cache_spec: Spec of the cache of one layer.
        max_new_tokens: Largest number of new tokens, for all prompts or per prompt.
        sampling: How tokens are drawn; None is greedy.
        stop_tokens: Ids that end a sequence; `decoder.config.stop_tokens` for a chat.
        key: Random key; required unless sampling is greedy. The same key draws the same tokens.
        steps: Largest number of steps between two looks of the host at the tokens.
        chunk: Largest number of prompts of one prefill; it bounds memory and the number of compiled programs.
        refill: Free rows at which the steps end early if prompts wait; None means an eighth of the rows.
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
        [(1, 2, 'length'), (2, 4, 'length'), (0, 9, 'length')]
        >>> [len(done.tokens) for done in many.collect()]
        [9, 2, 4]
    """
    refill = max(1, rows // 8) if refill is None else refill
    require_positive(rows=rows, steps=steps, chunk=chunk, refill=refill)
    sampling = Sampling() if sampling is None else sampling
    require_stop_tokens(stop_tokens, decoder.config)
    requests = make_requests(decoder, prompts, cache_spec, max_new_tokens)
    plan = _Plan(
        decoder=decoder,
        cache_spec=cache_spec,
        rows=rows,
        steps=steps,
        chunk=chunk,
        refill=min(refill, rows),
        stop=frozenset(int(token) for token in stop_tokens),
        key=require_key(key, sampling),
        sampling=sampling,
        implementation=implementation,
        precise=precise,
        longest=max((request.prompt.size for request in requests), default=1),
    )
    return ManyGenerations(plan, requests, (Bar() if progress is True else progress) or None)
