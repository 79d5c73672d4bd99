"""Encoding of tokens into pages: rotation, codes and scales, in place; time, floor and agreement with the reference."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.encode import encode_pages
from pallas_kernels.pages import Pages, empty_pages
from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.bench.paged import GROUP2, MSE, PROD3
from tq_jax.commands.bench.timing import Timing, time_runs
from tq_jax.quantizer import QuantizerSpec, encoder, make_quantizer

DIFFERENT = 1e-3
"""Largest share of stored bytes that differ from the reference, because float32 rounding breaks ties differently."""

CHECKED_TOKENS = 1024
"""Most tokens that are compared with the reference."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: keys and values of some tokens.

    Attributes:
        batch: Number of sequences.
        tokens: Tokens per sequence.
        key: Arguments of the keys' quantizer besides dim.
        value: Arguments of the values' quantizer besides dim.
        search: Whether the step of each vector is searched.
        kv_heads: Number of KV heads.
        head_dim: Channels of a head.
        page_size: Tokens per page.
    """

    batch: int
    tokens: int
    key: dict[str, Any]
    value: dict[str, Any]
    search: bool = False
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 256

    @property
    def specs(self) -> tuple[QuantizerSpec, QuantizerSpec]:
        """The quantizers of keys and of values."""

        def spec(options: dict[str, Any]) -> QuantizerSpec:
            search: dict[str, Any] = {} if options.get("kind") == "group" else {"search": self.search}
            return QuantizerSpec(self.head_dim, **(options | search))

        return spec(self.key), spec(self.value)

    @property
    def vectors(self) -> int:
        """Number of vectors, keys and values together."""
        return 2 * self.batch * self.tokens * self.kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes of the bfloat16 vectors that are read and of the codes that are written.

        Example:
            >>> Case(1, 1, MSE[4], MSE[4], kv_heads=1).nbytes
            644
        """
        stored = sum(spec.format.bytes_per_vector for spec in self.specs)
        return self.vectors * 2 * self.head_dim + self.vectors // 2 * stored

    @property
    def label(self) -> str:
        """The case in one line."""
        key, value = (f"{spec.kind}{spec.bits:g}" for spec in self.specs)
        return f"encode {self.batch} x {self.tokens}, {key}/{value}" + (", search" if self.search else "")


PROMPT = (8, 8192)
"""Sequences, and tokens per sequence, whose keys and values are about a million vectors."""


def cases() -> Iterator[Case]:
    """Yields the cases for a GPU."""
    for search in (False, True):
        for bits in (4, 3, 2):
            yield Case(*PROMPT, MSE[bits], MSE[bits], search=search)
    yield Case(*PROMPT, PROD3, GROUP2)
    yield Case(32, 1, MSE[4], MSE[4], search=True)


def jobs(setting: Setting) -> Iterator[Job]:
    """Yields the measurements of the encoder."""
    small = [Case(1, 256, MSE[4], MSE[4], kv_heads=2, page_size=128)]
    for case in cases() if setting.gpu else small:
        yield Job(case.label, functools.partial(run_case, case, setting))


def run_case(case: Case, setting: Setting) -> Iterator[Row]:
    """Yields the row of the project's kernel, or of the reference if there is no GPU."""
    implementation = "triton" if setting.gpu else "reference"
    row = {"op": "encode", "impl": implementation, "batch": case.batch, "seq": case.tokens, "kv_heads": case.kv_heads}
    row |= {"head_dim": case.head_dim, "key": _name(case.specs[0]), "value": _name(case.specs[1])}
    row |= {"search": case.search, "vectors": case.vectors, "page_size": case.page_size, "paged": True}
    if setting.gpu:
        row |= _agreement(dataclasses.replace(case, batch=1, tokens=min(case.tokens, CHECKED_TOKENS)))
    timing = _time(case, implementation)
    yield row | timing.as_dict() | setting.floor(timing.us, case.nbytes)


def _name(spec: QuantizerSpec) -> str:
    return f"{spec.kind}{spec.bits:g}"


def _arguments(case: Case) -> tuple[jax.Array, jax.Array, Pages, jax.Array, dict[str, Any]]:
    """Arguments of `encode_pages`: vectors, empty pools, each token's page slot in shuffled pages, and options."""
    quantizers = [make_quantizer(spec, seed=i) for i, spec in enumerate(case.specs)]
    shape = (case.batch, case.tokens, case.kv_heads, case.head_dim)
    keys, values = jax.random.normal(jax.random.key(0), (2, *shape), jnp.bfloat16)
    per_row = -(-case.tokens // case.page_size)
    order = np.random.default_rng(0).permutation(case.batch * per_row).reshape(case.batch, per_row)
    token = np.arange(case.tokens)
    slots = order[:, token // case.page_size] * case.page_size + token % case.page_size
    formats = [spec.format for spec in case.specs]
    pages = empty_pages(case.batch * per_row, case.kv_heads, case.page_size, formats[0], formats[1])
    channels = (case.batch, case.kv_heads, case.head_dim)
    statistics = {"mean": jnp.full(channels, 0.1), "weight": jnp.full(channels, 1.1)}
    encoders = {"key": encoder(quantizers[0]), "value": encoder(quantizers[1])}
    return keys, values, pages, jnp.asarray(slots, jnp.int32), encoders | statistics


def _function(implementation: str) -> Any:
    return jax.jit(functools.partial(encode_pages, implementation=implementation), donate_argnums=2)


def _time(case: Case, implementation: str) -> Timing:
    keys, values, pages, slots, options = _arguments(case)
    function = _function(implementation)

    def run(repeats: int) -> None:
        nonlocal pages
        for _ in range(repeats):
            pages = function(keys, values, pages, slots, **options)
        jax.block_until_ready(pages)

    return time_runs(run, 1)


def _agreement(case: Case) -> Row:
    """Share of bytes that differ from the reference, and whether two runs give equal bits."""
    got, again, want = (
        jax.tree.leaves(_function(implementation)(*arguments[:4], **arguments[4]))
        for implementation in ("triton", "triton", "reference")
        for arguments in [_arguments(case)]
    )
    same = all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again, strict=True))
    different = sum(int(jnp.sum(a != b)) for a, b in zip(got, want, strict=True)) / sum(a.size for a in want)
    return {"error": different, "same_twice": same, "ok": same and different <= DIFFERENT}
