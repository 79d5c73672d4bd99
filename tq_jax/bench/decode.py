"""Decode attention over packed pages: time, memory floor, peers, and agreement with the reference."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode import LogitOptions, Partial, TileConfig, decode_attention
from pallas_kernels.decode.pages import Pages, empty_pages
from tq_jax.bench.job import Job, Row, Setting
from tq_jax.bench.shapes import DECODE, SMALL, Shape
from tq_jax.bench.timing import num_copies, time_jax
from tq_jax.quantizer import QuantizerSpec

TOLERANCE = 0.03
"""Relative error that one-byte queries (0.7 %) and probabilities (1 to 2 %) may add over thousands of random values,
which nearly cancel."""

MSE = {bits: {"bits": bits} for bits in (2, 3, 4, 8)}
PROD3, GROUP2 = {"bits": 3, "kind": "prod"}, {"bits": 2, "kind": "group"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement of the project's kernel.

    Attributes:
        shape: What attends to what.
        key: Arguments of the keys' quantizer besides dim.
        value: Likewise of the values'.
        paged: Whether pages lie in random order, and not one after the other.
        page_size: Tokens a page.
        config: Tiles of the kernel; its own by default.
    """

    shape: Shape
    key: dict[str, Any]
    value: dict[str, Any]
    paged: bool = True
    page_size: int = 256
    config: TileConfig | None = None

    @property
    def specs(self) -> tuple[QuantizerSpec, QuantizerSpec]:
        """The quantizers."""
        return QuantizerSpec(self.shape.head_dim, **self.key), QuantizerSpec(self.shape.head_dim, **self.value)

    @property
    def names(self) -> tuple[str, str]:
        """The quantizers' names in rows, such as mse4.

        Example:
            >>> Case(DECODE["long"], PROD3, GROUP2).names
            ('prod3', 'group2')
        """
        key, value = (f"{spec.kind}{spec.bits:g}" for spec in self.specs)
        return key, value

    @property
    def nbytes(self) -> int:
        """Bytes that have to be read."""
        return self.shape.nbytes(sum(spec.format.bytes_per_vector for spec in self.specs))

    @property
    def label(self) -> str:
        """The case in a line."""
        order = "" if self.paged else ", in order"
        return f"decode {self.shape.label}, {'/'.join(self.names)}{order}"


def cases() -> Iterator[Case]:
    """What is measured on a GPU; shapes in turn, so that a time limit cuts whole shapes."""
    for name in ("batch 8", "batch 32", "long", "single"):
        for bits in (4, 3, 2):
            yield Case(DECODE[name], MSE[bits], MSE[bits])
        if name == "batch 8":
            yield Case(DECODE[name], MSE[4], MSE[4], paged=False)
            yield Case(DECODE[name], PROD3, GROUP2)
            yield Case(DECODE["verify"], MSE[4], MSE[4])
            yield Case(DECODE[name], MSE[8], MSE[4])
    for name in ("dim 64", "dim 256"):
        yield Case(DECODE[name], MSE[4], MSE[4])


def jobs(setting: Setting) -> Iterator[Job]:
    """Measurements of decode attention; the peers of a shape come before the project's kernel."""
    if not setting.gpu:
        for shape in SMALL.values():
            for bits in (4, 2):
                case = Case(shape, MSE[bits], MSE[bits], page_size=128)
                yield Job(case.label, functools.partial(run_case, case, setting))
        return
    measured: set[Shape] = set()
    for case in cases():
        if case.shape not in measured:
            measured.add(case.shape)
            for peer in setting.peers:
                if peer.supports(case.shape):
                    label = f"decode {case.shape.label}, {peer.name}"
                    yield Job(label, functools.partial(run_peer, peer, case.shape, setting), peer=True)
        yield Job(case.label, functools.partial(run_case, case, setting))


def run_peer(peer: Any, shape: Shape, setting: Setting) -> Iterator[Row]:
    """The row of a peer."""
    nbytes = peer.nbytes(shape)
    stored = "fp8" if peer.element_bytes == 1 else "bf16"
    timing = peer.time(shape)
    yield {
        "op": "decode",
        "impl": peer.name,
        **shape.as_dict(),
        "key": stored,
        "value": stored,
        "paged": peer.name.startswith("flashinfer"),
        **timing.as_dict(),
        "floor_us": round(setting.floor_us(nbytes), 2),
        "bytes": nbytes,
    }


def run_case(case: Case, setting: Setting) -> Iterator[Row]:
    """The row of the project's kernel, or of the reference where there is no GPU."""
    shape, nbytes = case.shape, case.nbytes
    key, value = (spec.format for spec in case.specs)
    copies = num_copies(nbytes) if setting.gpu else 1
    implementation = "triton" if setting.gpu else "reference"
    pages, tables = random_pages(case, copies)
    lengths = jnp.full(shape.batch, shape.seq, jnp.int32)
    positions = lengths[:, None] - shape.q_len + jnp.arange(shape.q_len, dtype=jnp.int32)[None]
    queries = (shape.batch, shape.q_len, shape.q_heads, shape.head_dim)
    query = jax.random.normal(jax.random.key(1), queries)
    attend = functools.partial(
        decode_attention, key_format=key, value_format=value, options=LogitOptions(shape.head_dim**-0.5)
    )
    arrays = dict(positions=positions, sketch_query=0.05 * query if case.specs[0].kind == "prod" else None)

    def run(implementation: str, table: jax.Array, query: jax.Array, pages: Pages, arrays: dict[str, Any]) -> Partial:
        config = case.config if implementation == "triton" else None
        return attend(query, pages, table, lengths, **arrays, implementation=implementation, config=config)

    function = jax.jit(run, static_argnums=0)
    row = {"op": "decode", "impl": implementation, **shape.as_dict()}
    row |= {"key": case.names[0], "value": case.names[1], "paged": case.paged, "page_size": case.page_size}
    row |= {"config": dataclasses.asdict(case.config)} if case.config else {}
    if setting.gpu:
        row |= _agreement(*(function(i, tables[0], query, pages, arrays) for i in ("triton", "triton", "reference")))
    timing = time_jax(function, [(implementation, table, query, pages, arrays) for table in tables])
    floor = setting.floor_us(nbytes)
    row |= timing.as_dict() | {"floor_us": round(floor, 2), "over_floor": round(timing.us / floor, 3), "bytes": nbytes}
    yield row


def random_pages(case: Case, copies: int) -> tuple[Pages, list[jax.Array]]:
    """Pools of random bytes and positive scales for some copies of a case, and the block table of each."""
    key, value = (spec.format for spec in case.specs)
    shape, size = case.shape, case.page_size
    count = copies * shape.batch * (shape.seq // size)
    shapes = jax.eval_shape(lambda: empty_pages(count, shape.kv_heads, size, key, value))
    leaves, tree = jax.tree.flatten(shapes)

    def fill(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(key, leaf.shape, jnp.uint8)
        return jax.random.uniform(key, leaf.shape, jnp.float32, 8.0, 14.0).astype(leaf.dtype)

    seeds = jax.random.split(jax.random.key(0), len(leaves))
    pages = tree.unflatten([fill(seed, leaf) for seed, leaf in zip(seeds, leaves, strict=True)])
    order = np.random.default_rng(0).permutation(count) if case.paged else np.arange(count)
    return pages, list(jnp.asarray(order.reshape(copies, shape.batch, -1), jnp.int32))


def _agreement(got: Partial, again: Partial, want: Partial) -> Row:
    """Relative error to the reference, and whether two runs are equal bit by bit."""

    def normalized(partial: Partial) -> jax.Array:
        return partial.acc / jnp.where(partial.total > 0, partial.total, 1.0)[..., None]

    error = float(jnp.linalg.norm(normalized(got) - normalized(want)) / jnp.linalg.norm(normalized(want)))
    same = bool(jnp.array_equal(got.acc, again.acc))
    return {"error": error, "same_twice": same, "ok": same and error <= TOLERANCE}
