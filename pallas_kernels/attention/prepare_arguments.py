"""What the prepare kernel is given, writes and is configured by."""

import dataclasses
from typing import Any

from pallas_kernels.attention.exact import ExactInputs, ExactPlan
from pallas_kernels.attention.merge_triton import Splits
from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.layer.heads import Heads
from pallas_kernels.pytree import pytree
from pallas_kernels.tiles.rotation_triton import Basis


@dataclasses.dataclass(frozen=True)
class PreparePlan:
    """Static configuration of the kernel.

    Attributes:
        options: Logit options.
        shape: Shape of the queries, [b, t, h_q, d].
        kv_heads: KV heads.
        sink_slots: Full-precision slots before the ring, one per sink token.
        pages_per_row: Pages per cache row; 0 without compressed tokens.
        page_size: Tokens per page.
        sketch_gain: Factor of the sketch of queries.
        exact: How the kernel attends over tokens in full precision; None if decode does, or if there are none.
        rotated: Queries that a program rotates.
        num_warps: Warps per program.
        interpret: Whether the kernel runs as jnp.
    """

    options: LogitOptions
    shape: tuple[int, int, int, int]
    kv_heads: int
    sink_slots: int
    pages_per_row: int
    page_size: int
    sketch_gain: float
    exact: ExactPlan | None
    rotated: int
    num_warps: int
    interpret: bool


@pytree
class PrepareInputs:
    """Arrays of the kernel, or references; None where a field does not apply.

    Attributes:
        tokens: Queries and tokens in full precision.
        mean: float32 [rows, h_kv, d], subtracted from compressed keys.
        weight: float32 [rows, h_kv, d], multiplied to compressed keys.
        basis: Rotated basis of compressed keys.
        sketch: float32 [d, d], matrix of Prod keys.
    """

    tokens: ExactInputs
    mean: Any = None
    weight: Any = None
    basis: Basis | None = None
    sketch: Any = None


@pytree
class Prepared:
    """Outputs of the kernel; None where a field does not apply.

    Attributes:
        exact: Attention over tokens in full precision: the splits of the slots, then one of new tokens.
        query: float32 [b, t, h_q, d], divided by the weight and rotated.
        bias: float32 [b, t, h_q], logits of the queries with the key mean.
        sketch: float32 [b, t, h_q, d], sketch of the rotated queries times its gain.
        table: int32 [b, pages_per_row], block table of the pages that are still there, in order.
        lengths: int32 [b], tokens in these pages.
        positions: int32 [b, t], positions of the queries, counted from the first token of these pages.
        heads: The heads of a joint product.
    """

    exact: Splits | None = None
    query: Any = None
    bias: Any = None
    sketch: Any = None
    table: Any = None
    lengths: Any = None
    positions: Any = None
    heads: Heads | None = None
