"""Static configuration that every kernel over packed pages has."""

import dataclasses

from pallas_kernels.attention.options import LogitOptions
from pallas_kernels.tiles.layout import Part
from pallas_kernels.tiles.pool_ref import PoolShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagePlan:
    """How queries attend to tiles of packed pages.

    Attributes:
        keys: Parts of the keys.
        values: Parts of the values.
        options: Logit options.
        count: Query tokens.
        group: Query heads per KV head.
        tile: Tokens per step.
        page_size: Tokens per page.
        splits: Programs that share the tokens of a sequence.
        interpret: Whether the kernel runs as jnp.
        pools: Where the pages of each array with elements lie.
    """

    keys: tuple[Part, ...]
    values: tuple[Part, ...]
    options: LogitOptions
    count: int
    group: int
    tile: int
    page_size: int
    splits: int
    interpret: bool
    pools: tuple[PoolShape, ...] = ()
