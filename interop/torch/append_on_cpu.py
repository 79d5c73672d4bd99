"""Appending to a torch-owned cache on a CPU: JAX computes codes and statistics, torch moves tokens and writes."""

from typing import Any

import jax
import torch

from interop.torch import jax_calls
from interop.torch.placement import Moves


def update_statistics(
    arrays: Any,
    k: torch.Tensor,
    query: torch.Tensor | None,
    *,
    lengths: tuple[int, ...],
    counts: tuple[int, ...],
    evicts: tuple[bool, ...],
) -> bool:
    """Observes the queries of a chunk and fixes the statistics of rows whose first token leaves the window, in place.

    Args:
        arrays: Tensors of the cache before the append.
        k: Keys of the chunk [rows, t, h_kv, d].
        query: Queries of the chunk [rows, t, h_q, d], or None to observe none.
        lengths: Tokens of each row before the append.
        counts: New tokens of each row.
        evicts: For each row, whether the append moves any of its tokens to the pages.

    Returns:
        Whether the statistics of all rows are fixed now.
    """
    statistics, spec = arrays.statistics, arrays.spec
    if query is None and not any(evicts):
        return bool(statistics.ready.all())
    fix = ~statistics.ready & torch.tensor(evicts, device=k.device)
    host = torch.device("cpu")  # and not torch's default device, which scripts change
    before, step = torch.tensor(lengths, device=host)[:, None], torch.arange(k.shape[1], device=host)[None]
    exists = step < torch.tensor(counts, device=host)[:, None]
    keys = valid = None
    if any(evicts):
        in_ring = torch.arange(spec.ring, device=host)[None] < before - spec.sinks
        valid = torch.cat([in_ring, exists & (before + step >= spec.sinks)], 1).to(k.device)
        keys = torch.cat([arrays.exact_keys[:, :, spec.sinks :].transpose(1, 2), k], 1).float()
    new = jax_calls.update_statistics(
        statistics, query=query if query is None else query.detach(), exists=exists.to(k.device),
        keys=keys, valid=valid, fix=fix, center=spec.center_keys, smooth=spec.smooth_keys,
    )  # fmt: skip
    jax.tree.map(lambda old, value: old.copy_(value), statistics, new)
    return bool(statistics.ready.all())


def write_chunk(arrays: Any, view: Any, k: torch.Tensor, v: torch.Tensor, moves: Moves) -> None:
    """Writes a chunk to the window, and the tokens that leave the window to the pages.

    Args:
        arrays: Tensors of the cache.
        view: JAX views of the same memory.
        k: Keys of the chunk [rows, t, h_kv, d], in the type of the window.
        v: Values, shaped like the keys.
        moves: Source and target of each token.
    """
    if moves.page.numel():
        _compress(arrays, view, k, v, moves)
    where = (moves.kept_row, slice(None), moves.kept_slot)
    arrays.exact_keys[where] = k[moves.kept_row, moves.kept_step]
    arrays.exact_values[where] = v[moves.kept_row, moves.kept_step]
    arrays.length.copy_(moves.counters[0])
    arrays.compressed.copy_(moves.counters[1])


def _compress(arrays: Any, view: Any, k: torch.Tensor, v: torch.Tensor, moves: Moves) -> None:
    """Quantizes the tokens that leave and writes them to their pages."""
    sources = ((arrays.exact_keys, k), (arrays.exact_values, v))
    for start in range(0, moves.page.numel(), jax_calls.LARGEST_BATCH):
        part = slice(start, start + jax_calls.LARGEST_BATCH)
        keys, values = (_leaving(exact, chunk, moves, part).float() for exact, chunk in sources)
        rows, page, place = (x[part] for x in (moves.leaving_row, moves.page, moves.place))
        if arrays.statistics is not None:
            keys = (keys - arrays.statistics.mean[rows]) * arrays.statistics.weight[rows]
        codes = jax_calls.encode_tokens(view.key_quantizer, view.value_quantizer, keys, values)
        jax_calls.write_codes(arrays.pages.keys, codes[0], page, place, channel_major=False)
        jax_calls.write_codes(arrays.pages.values, codes[1], page, place, channel_major=True)


def _leaving(exact: torch.Tensor, chunk: torch.Tensor, moves: Moves, part: slice) -> torch.Tensor:
    """Tokens that go to the pages, [n, h_kv, d]: tokens of the ring, then tokens of the chunk."""
    split = moves.ring_row.numel()
    old, new = slice(part.start, min(part.stop, split)), slice(max(part.start - split, 0), max(part.stop - split, 0))
    ring = exact[moves.ring_row[old], :, moves.ring_slot[old]]
    return torch.cat([ring, chunk[moves.chunk_row[new], moves.chunk_step[new]]])
