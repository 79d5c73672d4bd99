"""Whether the tokens of an append fit, and where each token goes: index tensors made on the host, no cache bytes.

The rules are those of `tq_jax.append`: a new token goes to its sink slot or ring slot, and the oldest tokens of the
ring, or of the chunk itself, leave for the pages.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import numpy as np
import torch

from pallas_kernels.append.slots import left, slot_of, stays
from tq_jax import CacheSpec


@dataclasses.dataclass(frozen=True)
class Moves:
    """The moves of one append. Index tensors are int64 [tokens moved] on the cache's device; rows are cache rows.

    Attributes:
        kept_row: Row of each new token that stays in full precision.
        kept_step: Position in the chunk of each new token that stays in full precision.
        kept_slot: Slot of each new token that stays in full precision.
        ring_row: Row of each token that leaves the ring for the pages.
        ring_slot: Slot of each token that leaves the ring for the pages.
        chunk_row: Row of each new token that goes to the pages at once.
        chunk_step: Position in the chunk of each new token that goes to the pages at once.
        leaving_row: Row of each token that goes to the pages; tokens from the ring first, then tokens of the chunk.
        page: Page of each token of `leaving_row`.
        place: Place in the page of each token of `leaving_row`.
        counters: int32 [2, rows] on the device: tokens of each row, and tokens in its pages, after the append.
        length: Tokens of each row after the append, on the host.
        compressed: Tokens in the pages of each row after the append, on the host.
    """

    kept_row: torch.Tensor
    kept_step: torch.Tensor
    kept_slot: torch.Tensor
    ring_row: torch.Tensor
    ring_slot: torch.Tensor
    chunk_row: torch.Tensor
    chunk_step: torch.Tensor
    leaving_row: torch.Tensor
    page: torch.Tensor
    place: torch.Tensor
    counters: torch.Tensor
    length: tuple[int, ...]
    compressed: tuple[int, ...]


def counters_after(
    spec: CacheSpec, length: tuple[int, ...], compressed: tuple[int, ...], counts: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of each row, and tokens in its pages, after an append of counts[r] tokens to each row r."""
    after = tuple(before + count for before, count in zip(length, counts, strict=True))
    places = dict(sink_slots=spec.sinks, ring=spec.ring)
    return after, tuple(max(old, left(new, **places)) for old, new in zip(compressed, after, strict=True))


@functools.lru_cache(maxsize=8)  # the layers of a model append alike, so all but the first find their moves here
def plan_append(
    spec: CacheSpec,
    length: tuple[int, ...],
    compressed: tuple[int, ...],
    counts: tuple[int, ...],
    device: str,
) -> Moves:
    """Plans an append of counts[r] tokens to each row r.

    Args:
        spec: Configuration of the cache.
        length: Tokens of each row before the append.
        compressed: Tokens in the pages of each row before the append.
        counts: New tokens of each row.
        device: Where the index tensors go.

    Returns:
        The moves and the counters after them.

    Example:
        >>> import tq_jax as tq
        >>> quantizer = tq.QuantizerSpec(dim=64)
        >>> spec = tq.CacheSpec(1, 64, 100, quantizer, quantizer, window=8, sink_tokens=2)
        >>> moves = plan_append(spec, (9,), (0,), (3,), "cpu")
        >>> moves.kept_slot.tolist(), moves.ring_slot.tolist(), moves.compressed
        ([9, 2, 3], [2, 3], (2,))
    """
    after, packed = counters_after(spec, length, compressed, counts)
    places = dict(sink_slots=spec.sinks, ring=spec.ring)
    kept, ring, chunk, pages = [], [], [], []
    for row, (before, end, start, stop) in enumerate(zip(length, after, compressed, packed, strict=True)):
        position = np.arange(before, end)
        position = position[stays(position, end, **places)]
        kept.append(_columns(row, position - before, slot_of(position, **places)))
        address = np.arange(start, stop)
        old = address[spec.sinks + address < before]
        new = address[len(old) :]
        ring.append(_columns(row, slot_of(spec.sinks + old, **places)))
        chunk.append(_columns(row, spec.sinks + new - before))
        pages.append((row * spec.pages_per_row, old, new))
    addresses = [(base, old) for base, old, _ in pages] + [(base, new) for base, _, new in pages]
    page = np.concatenate([base + address // spec.page_size for base, address in addresses])
    place = np.concatenate([address % spec.page_size for _, address in addresses])
    old, new = np.concatenate(ring, 1), np.concatenate(chunk, 1)
    indices = [*np.concatenate(kept, 1), *old, *new, np.concatenate([old[0], new[0]]), page, place]
    tensors = [torch.from_numpy(np.ascontiguousarray(index, np.int64)).to(device) for index in indices]
    counters = torch.tensor([after, packed], dtype=torch.int32, device=device)
    return Moves(*tensors, counters=counters, length=after, compressed=packed)


def require_room(spec: CacheSpec, lengths: tuple[int, ...], counts: tuple[int, ...]) -> None:
    """Raises ValueError for rows without room for counts[r] more tokens."""
    total = [before + count for before, count in zip(lengths, counts, strict=True)]
    if max(total, default=0) > spec.max_tokens:
        raise ValueError(f"expected at most max_tokens={spec.max_tokens} tokens per row, got {total}")


def require_chunk(
    spec: CacheSpec,
    device: torch.device,
    rows: int,
    k: torch.Tensor,
    v: torch.Tensor,
    query: torch.Tensor | None,
) -> None:
    """Raises ValueError for a chunk that a cache of so many rows cannot take, by its shapes, types or device."""
    heads, dim = spec.num_kv_heads, spec.head_dim
    tokens = k.shape[1] if k.ndim == 4 else 0
    shape = (rows, tokens, heads, dim)
    if k.shape != shape or v.shape != shape:
        got = f"{tuple(k.shape)}" if k.shape == v.shape else f"{tuple(k.shape)} and {tuple(v.shape)}"
        heads_first = k.ndim == 4 and k.shape == v.shape == (rows, heads, k.shape[2], dim)
        hint = ": transpose(1, 2)?" if heads_first else ""
        raise ValueError(f"expected k and v of shape ({rows}, tokens, {heads}, {dim}) each, got {got}{hint}")
    if query is not None and (query.shape != (rows, tokens, *query.shape[2:3], dim) or query.shape[2] % heads):
        wanted = f"({rows}, {tokens}, a multiple of {heads}, {dim})"
        raise ValueError(f"expected query of shape {wanted}, got {tuple(query.shape)}")
    for name, tensor in (("k", k), ("v", v), ("query", query)):
        if tensor is not None and not (tensor.is_floating_point() and tensor.device.type == device.type):
            raise ValueError(f"expected {name} to be floating point on {device}, got {tensor.dtype} on {tensor.device}")


def row_integers(given: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    """One integer per row.

    Raises:
        ValueError: For fractions, which would be cut off, and masks, which would count as 0 and 1.

    Example:
        >>> row_integers(torch.tensor([3, 4]))
        (3, 4)
    """
    values = given.tolist() if isinstance(given, torch.Tensor) else list(given)
    if not isinstance(values, list) or any(isinstance(x, bool) or not hasattr(x, "__index__") for x in values):
        raise ValueError(f"expected integers, one for each row, got {values}")
    return tuple(operator.index(x) for x in values)


def integers_of_rows(given: int | Sequence[int] | torch.Tensor, rows: int) -> tuple[int, ...]:
    """One integer per row; a single integer, of any library, stands for all rows. Raises as `row_integers` does."""
    single = not isinstance(given, bool) and hasattr(given, "__index__") and not getattr(given, "ndim", 0)
    return (operator.index(given),) * rows if single else row_integers(given)  # pyright: ignore[reportArgumentType]


def _columns(row: int, *columns: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(columns[0]), row), *columns])
