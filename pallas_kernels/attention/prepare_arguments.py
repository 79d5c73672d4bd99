"""What the prepare kernel is given, writes and is configured by."""

import dataclasses
from typing import Any

from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.rotation_triton import Basis


@dataclasses.dataclass(frozen=True)
class PreparePlan:
    """Static configuration of the kernel.

    Attributes:
        options: Logit options.
        kv_heads: KV heads.
        sink_slots: Full-precision slots before the ring, one per sink token.
        pages_per_row: Pages per cache row; 0 without compressed tokens.
        page_size: Tokens per page.
        sketch_gain: Factor of the sketch of queries.
        slot_tile: Full-precision slots per step.
        slot_queries: Query rows of a KV head that a program attends with.
        slot_splits: Programs that share the slots of a sequence and KV head; 0 without slots.
        rotated: Queries that a program rotates.
        num_warps: Warps per program.
        interpret: Whether the kernel runs as jnp.
    """

    options: LogitOptions
    kv_heads: int
    sink_slots: int
    pages_per_row: int
    page_size: int
    sketch_gain: float
    slot_tile: int
    slot_queries: int
    slot_splits: int
    rotated: int
    num_warps: int
    interpret: bool


@pytree
class PrepareInputs:
    """Arrays of the kernel, or references; None where a field does not apply.

    Attributes:
        query: [b, t, h_q, d] of any float type.
        rows: int32 [b], cache row of each sequence; None for all in order.
        counts: int32 [b], query tokens of each sequence; None for t.
        length: int32 [rows], tokens of each cache row.
        compressed: int32 [rows], tokens that left the ring for the pages.
        keys: [rows, h_kv, slots, d], full-precision keys; uint16 are the bits of bfloat16.
        values: [rows, h_kv, slots, d], full-precision values, of the type of the keys.
        mean: float32 [rows, h_kv, d], subtracted from compressed keys.
        weight: float32 [rows, h_kv, d], multiplied to compressed keys.
        basis: Rotated basis of compressed keys.
        sketch: float32 [d, d], matrix of Prod keys.
        new_keys: [b, t, h_kv, d], keys of the queries' own tokens, of any float type, if the cache does not hold them
            yet.
        new_values: [b, t, h_kv, d], their values.
        back: int32 [b], tokens from the first query to the end of the cache row: 0 if the queries follow the row's
            tokens; None for `counts`, if they belong to its last tokens.
    """

    query: Any
    rows: Any
    counts: Any
    length: Any
    compressed: Any
    keys: Any
    values: Any
    mean: Any
    weight: Any
    basis: Basis | None
    sketch: Any
    new_keys: Any = None
    new_values: Any = None
    back: Any = None


@pytree
class Prepared:
    """Outputs of the kernel; None where a field does not apply.

    Attributes:
        acc: float32 [b, h_kv, splits, t * g, d], attention over full-precision tokens, see `merge_triton.Splits`: the
            splits of the slots, then one of new tokens.
        peak: float32 [b, h_kv, splits, t * g].
        total: float32 [b, h_kv, splits, t * g].
        query: float32 [b, t, h_q, d], divided by the weight and rotated.
        bias: float32 [b, t, h_q], logits of the queries with the key mean.
        sketch: float32 [b, t, h_q, d], sketch of the rotated queries times its gain.
        table: int32 [b, pages_per_row], block table of the pages that are still there, in order.
        lengths: int32 [b], tokens in these pages.
        positions: int32 [b, t], positions of the queries, counted from the first token of these pages.
    """

    acc: Any = None
    peak: Any = None
    total: Any = None
    query: Any = None
    bias: Any = None
    sketch: Any = None
    table: Any = None
    lengths: Any = None
    positions: Any = None
