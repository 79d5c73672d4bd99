"""Cases for attention over pages: every format, head_dim, mask and number of rows; unwritten memory is poisoned."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from pallas_kernels.attention import LogitOptions, PagedArguments, Partial, decode_attention
from pallas_kernels.attention.decode.config import has_pairs
from pallas_kernels.pages import empty_pages, write_tokens
from tests.kernels.cases.formats import Formats
from tq_jax.quantizer import encode_rotated, sketch_gain, sketch_query


@dataclasses.dataclass(frozen=True)
class Variant(Formats):
    """Queries and the sequences that they attend to, beside the formats of these.

    Attributes:
        lengths: Tokens of each sequence.
        group: Query heads per KV head.
        count: Query tokens per sequence.
        page_size: Tokens per page.
        softcap: Soft-cap of the logits.
        window: Sliding window.
        bias: Whether a bias is added to the logits.
    """

    lengths: tuple[int, ...] = (200, 1, 0, 64, 129)
    group: int = 4
    count: int = 1
    page_size: int = 128
    softcap: float | None = None
    window: int | None = None
    bias: bool = False


def _bits(key: float, value: float, **options: Any) -> Variant:
    return Variant(key={"bits": key}, value={"bits": value}, **options)


GROUP2 = {"bits": 2, "kind": "group"}
VARIANTS = {
    "k4v4": _bits(4, 4),
    "k2v2": _bits(2, 2),
    "k3v3": _bits(3, 3),
    "k8v8": _bits(8, 8),
    "k1v1": _bits(1, 1),
    "k8v3": _bits(8, 3),
    "k2.5v3.5": _bits(2.5, 3.5),
    "k4v2.5 d64": _bits(4, 2.5, dim=64),
    "prod4 v2": Variant(key={"bits": 4, "kind": "prod"}, value={"bits": 2}),
    "prod3 group2": Variant(key={"bits": 3, "kind": "prod"}, value=GROUP2),
    "prod2 group4": Variant(key={"bits": 2, "kind": "prod"}, value={"bits": 4, "kind": "group", "group": 64}),
    "prod1 v3": Variant(key={"bits": 1, "kind": "prod"}, value={"bits": 3}),
    "d64": _bits(4, 3, dim=64),
    "d64 low": _bits(2, 2, dim=64),
    "d80": _bits(4, 3, dim=80),
    "d80 low": _bits(2, 2, dim=80),
    "d96": _bits(4, 3, dim=96),
    "d96 group": Variant(key={"bits": 3}, value={"bits": 4, "kind": "group"}, dim=96),
    "d192": _bits(3, 4, dim=192),
    "d256": _bits(4, 2, dim=256),
    "d256 3": _bits(3, 3, dim=256, group=2),
    "bias": _bits(4, 4, bias=True),
    "softcap": _bits(4, 4, softcap=3.0),
    "softcap bias": _bits(4, 4, softcap=3.0, bias=True),
    "window": _bits(4, 4, window=33),
    "window 1": _bits(4, 4, window=1),
    "count 5": _bits(4, 4, count=5),
    "count 5 window": _bits(3, 4, count=5, window=70, softcap=5.0, bias=True),
    "count 8 group 4": _bits(4, 4, count=8, group=4),
    "group 1": _bits(4, 4, group=1),
    "group 5": _bits(4, 4, group=5),
    "group 16": _bits(4, 4, group=16),
    "group 16 k8": _bits(8, 4, group=16),
    "group 16 count 8": _bits(4, 4, group=16, count=8),
    "group 16 uniform": _bits(4, 4, group=16, lengths=(1000,)),
    "group 5 count 8 d256": _bits(3, 4, dim=256, group=5, count=8),
    "d80 3": _bits(3, 3, dim=80),
    "d64 3.5": _bits(3.5, 3.5, dim=64),
    "d80 prod2": Variant(key={"bits": 2, "kind": "prod"}, value=GROUP2 | {"group": 16}, dim=80),
    "pages 16": _bits(4, 4, page_size=16),
    "pages 16 window": _bits(3, 2, page_size=16, window=40, count=3),
    "pages 32": _bits(4, 4, page_size=32),
    "pages 64": _bits(4, 3, page_size=64),
    "uniform": _bits(4, 4, page_size=128, lengths=(2000, 700)),
    "pages 128": _bits(4, 4, page_size=128, lengths=(300, 5)),
    "pages 256 float32": Variant(
        key={"bits": 4, "scale_dtype": "float32"}, value={"bits": 4, "scale_dtype": "float32"}, page_size=256,
        lengths=(700, 256),
    ),
}  # fmt: skip
"""Cases by name."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of attention over pages: positional arrays, then keywords, some of them arrays."""

    arrays: tuple
    options: dict[str, Any]
    page_size: int

    @property
    def arguments(self) -> PagedArguments:
        """All of them in one."""
        return PagedArguments(*self.arrays, **self.options)


def make_case(variant: Variant, *, kv_heads: int = 2, seed: int = 0) -> Case:
    """Ragged sequences on shuffled pages; memory that is never written holds NaN or garbage, which tables point to."""
    rng = np.random.default_rng(seed)
    key, value = variant.specs
    lengths, size = np.array(variant.lengths), variant.page_size
    per_row = -(-max(variant.lengths) // size) + 1
    pool = len(lengths) * per_row
    table = rng.permutation(pool).reshape(len(lengths), per_row).astype(np.int32)
    quantizers = [tq.make_quantizer(spec, seed=i) for i, spec in enumerate(variant.specs)]
    shape = (len(lengths), max(lengths), kv_heads, variant.dim)
    vectors = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in quantizers]
    token = np.arange(max(lengths))
    page = np.where(token[None] < lengths[:, None], table[:, token // size], pool)
    slot = np.broadcast_to(token % size, page.shape)
    pages = _written(quantizers, vectors, jnp.asarray(page), jnp.asarray(slot), pool=pool, size=size)
    queries = (len(lengths), variant.count, kv_heads * variant.group, variant.dim)
    query = jnp.asarray(rng.standard_normal(queries), jnp.float32)
    positions = np.maximum(lengths[:, None] - variant.count + np.arange(variant.count), 0).astype(np.int32)
    bias = jnp.asarray(rng.standard_normal(queries[:3]), jnp.float32) if variant.bias else None
    sketch = _sketched(quantizers[0], query) if key.kind == "prod" else None
    options = dict(
        positions=jnp.asarray(positions),
        key_format=key.format,
        value_format=value.format,
        options=LogitOptions(variant.dim**-0.5, variant.softcap, variant.window),
        logit_bias=bias,
        sketch_query=sketch,
    )
    return Case((query, pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)), options, size)


@functools.partial(jax.jit, static_argnames=("pool", "size"))
def _written(quantizers, vectors, page, slot, *, pool: int, size: int):
    """Poisoned pages with the codes of vectors."""
    key, value = (q.spec.format for q in quantizers)
    pages = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0xA5),
        empty_pages(pool, vectors[0].shape[2], size, key, value),
    )
    codes = (encode_rotated(q, x) for q, x in zip(quantizers, vectors, strict=True))
    return write_tokens(pages, page, slot, *codes)


@jax.jit
def _sketched(quantizer, query):
    return sketch_query(quantizer, query) * sketch_gain(query.shape[-1])


def tolerance(variant: Variant, want: Partial) -> float:
    """Largest relative error of the kernel; if queries have one byte, a tenth of the error of the codes themselves.

    Args:
        variant: The case.
        want: The reference's result for it.
    """
    if has_pairs(variant.count * variant.group, dim=variant.dim) or variant.key["bits"] == 8:
        return 1e-4
    bytewise = dataclasses.replace(variant, key={"bits": 8}, value={"bits": 8})
    return relative_error(want, decode_reference(make_case(bytewise))) / 10


def decode_reference(case: Case) -> Partial:
    """The result that the kernel is compared with."""
    return _decoded(case.arguments)


@jax.jit
def _decoded(arguments: PagedArguments) -> Partial:
    return decode_attention(arguments, implementation="reference")


def normalized(partial: Partial) -> np.ndarray:
    """The output of attention."""
    return np.asarray(partial.acc / jnp.where(partial.total > 0, partial.total, 1.0)[..., None])


def relative_error(got: Partial, want: Partial) -> float:
    """Norm of the difference of the outputs over the norm of the wanted outputs; NaN counts as infinite."""
    a, b = normalized(got), normalized(want)
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return error if np.isfinite(error) else float("inf")
