"""JAX computations on a cache that torch owns: torch tensors in and out through DLPack, without copies of the cache.

Each function takes pytrees of torch tensors, runs one compiled JAX function and returns torch tensors. On a CPU their
values are computed when the function returns; on a GPU they are ordered before what torch launches next.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Bool, Float

import tq_jax as tq
from interop.torch.dlpack import CPU_ALIGNMENT, to_jax, to_torch
from tq_jax import read
from tq_jax.quantizer import encode_rotated, to_rotated
from tq_jax.statistics import KeyStatistics, fix_statistics, observe_queries

LARGEST_BATCH = 2048
"""Tokens per encoding call; bounds the float32 copies of a long prompt."""

BLOCK = 32
"""Tokens that are encoded at once. XLA orders the sums of a product by its shape: the last bit of a rotated vector, and
now and then a code, would depend on how many tokens come together. In blocks of one shape it does not."""


def encode_tokens(
    key_quantizer: tq.Quantizer,
    value_quantizer: tq.Quantizer,
    keys: Float[torch.Tensor, "n h_kv d"],
    values: Float[torch.Tensor, "n h_kv d"],
) -> tuple[tq.Code, tq.Code]:
    """Codes of tokens: the same bytes however many tokens come together.

    Args:
        key_quantizer: Quantizer of keys, whose leaves are JAX arrays on the tokens' device.
        value_quantizer: Quantizer of values, whose leaves are JAX arrays on the tokens' device.
        keys: float32, at most LARGEST_BATCH tokens; centred and weighted already.
        values: float32, of the same tokens.

    Returns:
        Codes of keys and of values, tensors with batch axes [n, h_kv].
    """
    count = keys.shape[0]
    padded = max(BLOCK, 1 << (count - 1).bit_length())  # few sizes, so that few functions are compiled
    keys, values = (_padded(x, padded) for x in (keys, values))
    codes = to_torch(_encode(key_quantizer, value_quantizer, to_jax(keys), to_jax(values)))
    return jax.tree.map(lambda x: x[:count], codes)


def update_statistics(
    statistics: KeyStatistics,
    *,
    query: Float[torch.Tensor, "b t h_q d"] | None,
    exists: Bool[torch.Tensor, "b t"],
    keys: Float[torch.Tensor, "b s h_kv d"] | None,
    valid: Bool[torch.Tensor, "b s"] | None,
    fix: Bool[torch.Tensor, "b"],
    center: bool,
    smooth: bool,
) -> KeyStatistics:
    """Key statistics after a chunk: the queries are observed, then the statistics of the rows in `fix` are fixed.

    Args:
        statistics: Statistics before, whose leaves are tensors.
        query: Queries of the chunk, or None to observe none.
        exists: Which tokens of the chunk are real, not padding.
        keys: float32 keys of the window and of the chunk; None to fix no row.
        valid: Which of `keys` are real; None to fix no row.
        fix: Rows to fix.
        center: Whether keys are centred.
        smooth: Whether channels are weighted.

    Returns:
        New statistics, on the device of `fix`.
    """
    given = (statistics, query, exists, keys, valid, fix)
    arrays = to_jax(jax.tree.map(lambda x: fresh(x.to(_readable(fix.device))), given))
    new = to_torch(_update_statistics(*arrays, center=center, smooth=smooth))
    return jax.tree.map(lambda x: x.to(fix.device), new)


def attend(query: Float[torch.Tensor, "b t h_q d"], cache: tq.Cache, **options: Any) -> torch.Tensor:
    """`tq_jax.attend` on a torch query and a cache of JAX views; options may be tensors (lengths, sink_logits)."""
    tensors = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    arrays = to_jax({"query": fresh(query.detach()), **{name: fresh(x.detach()) for name, x in tensors.items()}})
    return to_torch(tq.attend(cache=cache, **(options | arrays)))


def read_packed(
    pages: Any, quantizers: Any, statistics: tuple[torch.Tensor, torch.Tensor] | None, *, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tq_jax.read.read_packed` of pages [rows * n, ...], all of them, where JAX can read them.

    Args:
        pages: The pages, a pytree of tensors.
        quantizers: Quantizers of keys and of values, pytrees of tensors.
        statistics: Mean and channel weights of the keys; None for keys that are stored as they are.
        rows: Number of sequences.

    Returns:
        Keys and values, float32 [rows, h_kv, s, d], on the device of the pages.
    """
    device = jax.tree.leaves(pages)[0].device
    given = to_jax(jax.tree.map(lambda x: fresh(x.to(_readable(device))), (pages, quantizers, statistics)))
    return jax.tree.map(lambda x: x.to(device), to_torch(_read(*given, rows=rows)))


def write_codes(pool: tq.Code, code: tq.Code, page: torch.Tensor, place: torch.Tensor, *, channel_major: bool) -> None:
    """Writes codes to their page slots; `pallas_kernels.pages` draws the layouts.

    Args:
        pool: Keys or values of the pages, whose leaves are tensors; written in place.
        code: Codes with batch axes [n, h_kv].
        page: Page of each code, int64 [n].
        place: Place of each code in its page, int64 [n].
        channel_major: Whether the pool stores its codes by channel, as values are stored.
    """
    for name, tensor in vars(pool).items():
        if tensor is None:
            continue
        token_major = name == "signs" or (name == "packed" and not channel_major)
        where = (page, slice(None), place) if token_major else (page, ..., place)
        tensor[where] = getattr(code, name)


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if JAX could not share its memory."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % CPU_ALIGNMENT == 0 else tensor.clone()


def _readable(device: torch.device) -> torch.device:
    """The device itself if JAX can read its memory, or else the CPU."""
    return device if jax.default_backend() == "gpu" else torch.device("cpu")


def _padded(tokens: torch.Tensor, count: int) -> torch.Tensor:
    if tokens.shape[0] == count:
        return fresh(tokens)
    padded = tokens.new_zeros((count, *tokens.shape[1:]))
    padded[: tokens.shape[0]] = tokens
    return padded


@jax.jit
def _encode(key_quantizer: tq.Quantizer, value_quantizer: tq.Quantizer, keys: jax.Array, values: jax.Array):
    def encode_block(block: tuple[jax.Array, jax.Array]):
        return (
            encode_rotated(key_quantizer, to_rotated(key_quantizer, block[0])),
            encode_rotated(value_quantizer, to_rotated(value_quantizer, block[1])),
        )

    blocks = tuple(x.reshape(-1, BLOCK, *x.shape[1:]) for x in (keys, values))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(encode_block, blocks))


@functools.partial(jax.jit, static_argnames=("center", "smooth"))
def _update_statistics(
    statistics: KeyStatistics,
    query: jax.Array | None,
    exists: jax.Array,
    keys: jax.Array | None,
    valid: jax.Array | None,
    fix: jax.Array,
    *,
    center: bool,
    smooth: bool,
) -> KeyStatistics:
    if query is not None:
        statistics = observe_queries(statistics, query, exists)
    if keys is not None and valid is not None:
        statistics = fix_statistics(statistics, [(keys, valid)], fix, center=center, smooth=smooth)
    return statistics


@functools.partial(jax.jit, static_argnames="rows")
def _read(pages: Any, quantizers: Any, statistics: Any, *, rows: int) -> tuple[jax.Array, jax.Array]:
    table = jnp.arange(pages.count, dtype=jnp.int32).reshape(rows, -1)
    return read.read_packed(pages, table, quantizers, statistics)
