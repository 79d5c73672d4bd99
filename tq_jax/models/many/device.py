"""The device's side of `generate_many`: rows and cache stay there, and calls are handed over before others are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from tq_jax.attention import Implementation
from tq_jax.models.decoder import Decoder
from tq_jax.models.many.requests import Request, bucket
from tq_jax.models.many.steps import Batch, FlatDecoder, advance_rows, empty_rows, fill_rows
from tq_jax.models.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What stays the same during a generation, see `generate_many`; `longest` is that of the prompts."""

    decoder: Decoder
    cache_spec: tq.CacheSpec
    rows: int
    steps: int
    chunk: int
    stop: frozenset[int]
    key: jax.Array
    sampling: Sampling
    implementation: Implementation
    precise: bool
    longest: int


@dataclass(frozen=True)
class Flight:
    """A call that has been handed to the device and not been read.

    Attributes:
        owners: The request of each row when the call was handed over; None for a row without work.
        firsts: Requests that fill rows, and their first tokens.
        out: int32 [rows, steps], the tokens of the steps; None if no row had one to do.
    """

    owners: list[Request | None]
    firsts: list[tuple[list[Request], jax.Array]]
    out: jax.Array | None

    def read(self) -> Iterator[tuple[int, Request, list[int]]]:
        """Wait for the call.

        Yields:
            A number of steps, a request, and the tokens that it drew in these steps; first tokens take no step.
        """
        firsts, out = jax.device_get(([first for _, first in self.firsts], self.out))
        for (requests, _), tokens in zip(self.firsts, firsts, strict=True):
            for request, token in zip(requests, tokens.tolist(), strict=False):
                yield 0, request, [token]
        for request, tokens in zip(self.owners, [] if out is None else out.tolist(), strict=out is not None):
            drawn = [token for token in tokens if token >= 0]
            if request is not None:
                yield len(drawn), request, drawn


class Device:
    """Rows and cache of a generation. A call needs nothing that an earlier one returns to the host.

    Args:
        plan: What stays the same.

    Attributes:
        cache: The cache; each call takes it and leaves another.

    Raises:
        ValueError: If the spec of the cache is that of another model.
    """

    def __init__(self, plan: Plan):
        self._plan, self._flat, self._rows = plan, FlatDecoder.of(plan.decoder), empty_rows(plan.rows)
        # Padded with what is no token, so that few numbers of stop tokens have programs of their own.
        stop = sorted(plan.stop)
        self._stop = jnp.asarray(np.array(stop + [-1] * (8 - len(stop) % 8), np.int32))
        self.cache = plan.decoder.init_cache(plan.cache_spec, batch=plan.rows)

    def start(self, owners: Sequence[Request | None], new: Sequence[tuple[int, Request]]) -> Flight:
        """Hand over a call: prompts into their rows, then the steps of all rows that have one to do.

        Args:
            owners: The request of each row, those of `new` included; None for a row without work.
            new: Rows and the requests that fill them.
        """
        plan, firsts, out = self._plan, [], None
        for group in self._groups(new):
            firsts.append(([request for _, request in group], self._fill(group)))
            for _, request in group:
                request.foreseen = 1
        if any(request is not None and not request.ends for request in owners):
            idle = np.array([request is None for request in owners])
            out, self._rows, self.cache = advance_rows(
                self._flat, self._rows, self.cache, idle, plan.key, self._stop,
                sampling=plan.sampling, steps=plan.steps, implementation=plan.implementation, precise=plan.precise,
            )  # fmt: skip
            for request in owners:
                if request is not None:
                    request.foreseen += plan.steps
        return Flight(list(owners), firsts, out)

    def _groups(self, new: Sequence[tuple[int, Request]]) -> Iterator[list[tuple[int, Request]]]:
        """Rows and their new requests, in groups of one padded length and at most `chunk` prompts."""
        lengths: dict[int, list[tuple[int, Request]]] = {}
        for row, request in new:
            lengths.setdefault(bucket(request.prompt.size, self._plan.longest), []).append((row, request))
        for group in lengths.values():
            for start in range(0, len(group), self._plan.chunk):
                yield group[start : start + self._plan.chunk]

    def _fill(self, group: list[tuple[int, Request]]) -> jax.Array:
        """Start the prefill of prompts of one padded length: their first tokens."""
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
        batch = Batch(tokens, lengths, rows, prompt, limit)
        first, self._rows, self.cache = fill_rows(
            self._flat, batch, self._rows, self.cache, plan.key, self._stop, sampling=plan.sampling
        )
        return first
