"""Attention of one or many queries over packed pages: time, floor, peers, and agreement with the reference."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import LogitOptions, PagedArguments, Partial
from pallas_kernels.pages import Pages, empty_pages
from tq_jax.commands.bench.job import Job, Row, Setting
from tq_jax.commands.bench.peers import Peer
from tq_jax.commands.bench.shapes import Shape
from tq_jax.commands.bench.timing import num_copies, time_jax
from tq_jax.quantizer import QuantizerSpec

MSE = {bits: {"bits": bits} for bits in (2, 3, 4, 8)}
PROD3, GROUP2 = {"bits": 3, "kind": "prod"}, {"bits": 2, "kind": "group"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement of the project's kernel.

    Attributes:
        shape: Shape of the attention.
        key: Arguments of the keys' quantizer besides dim.
        value: Arguments of the values' quantizer besides dim.
        paged: Whether pages lie in random order instead of one after the other.
        page_size: Tokens per page.
        config: Tiles of the kernel; the kernel's default tiles if None.
    """

    shape: Shape
    key: dict[str, Any]
    value: dict[str, Any]
    paged: bool = True
    page_size: int = 256
    config: Any = None

    @property
    def specs(self) -> tuple[QuantizerSpec, QuantizerSpec]:
        """The quantizers of keys and of values."""
        return QuantizerSpec(self.shape.head_dim, **self.key), QuantizerSpec(self.shape.head_dim, **self.value)

    @property
    def names(self) -> tuple[str, str]:
        """The quantizers' names in rows, such as mse4.

        Example:
            >>> Case(Shape(1, 131072), PROD3, GROUP2).names
            ('prod3', 'group2')
        """
        key, value = (f"{spec.kind}{spec.bits:g}" for spec in self.specs)
        return key, value

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that must be read."""
        return self.shape.nbytes(sum(spec.format.bytes_per_vector for spec in self.specs))

    @property
    def label(self) -> str:
        """The case in one line."""
        return f"{self.shape.label}, {'/'.join(self.names)}" + ("" if self.paged else ", in order")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on pages.

    Attributes:
        name: Name in rows.
        function: `decode_attention` or `prefill_attention`.
        tolerance: Gives the largest relative error of the kernel in a case.
    """

    name: str
    function: Callable[..., Partial]
    tolerance: Callable[[Case], float]

    def jobs(self, cases: Sequence[Case], setting: Setting) -> Iterator[Job]:
        """Yields the measurements of cases; the peers of a shape come before its first case."""
        measured: set[Shape] = set()
        for case in cases:
            for peer in setting.peers if case.shape not in measured else ():
                if peer.supports(case.shape):
                    label = f"{self.name} {case.shape.label}, {peer.name}"
                    yield Job(label, functools.partial(run_peer, self.name, peer, case.shape, setting), peer=True)
            measured.add(case.shape)
            yield Job(f"{self.name} {case.label}", functools.partial(run_case, self, case, setting))


def run_peer(op: str, peer: Peer, shape: Shape, setting: Setting) -> Iterator[Row]:
    """Yields the row of a peer."""
    nbytes = peer.nbytes(shape)
    stored = "fp8" if peer.element_bytes == 1 else "bf16"
    timing = peer.time(shape)
    yield {
        "op": op,
        "impl": peer.name,
        **shape.as_dict(),
        "key": stored,
        "value": stored,
        "paged": peer.name.startswith("flashinfer"),
        **timing.as_dict(),
        **setting.floor(timing.us, nbytes, shape.operations),
        "memory": nbytes,
    }


def run_case(operation: Operation, case: Case, setting: Setting) -> Iterator[Row]:
    """Yields the row of the project's kernel, or of the reference if there is no GPU."""
    shape, nbytes = case.shape, case.nbytes
    key, value = (spec.format for spec in case.specs)
    implementation = "triton" if setting.gpu else "reference"
    pages, tables = random_pages(case, num_copies(nbytes) if setting.gpu else 1)
    lengths = jnp.full(shape.batch, shape.seq, jnp.int32)
    positions = lengths[:, None] - shape.q_len + jnp.arange(shape.q_len, dtype=jnp.int32)[None]
    query = jax.random.normal(jax.random.key(1), (shape.batch, shape.q_len, shape.q_heads, shape.head_dim))
    sketch = 0.05 * query if case.specs[0].kind == "prod" else None

    def compiled(implementation: str) -> Any:
        config = case.config if implementation == "triton" else None
        run = functools.partial(operation.function, implementation=implementation, config=config)
        return jax.jit(run).lower(*inputs[0]).compile()

    options = LogitOptions(shape.head_dim**-0.5)
    inputs = [
        (PagedArguments(query, pages, table, lengths, positions, key, value, options, sketch_query=sketch),)
        for table in tables
    ]
    kernel = compiled(implementation)
    row = {"op": operation.name, "impl": implementation, **shape.as_dict()}
    row |= {"key": case.names[0], "value": case.names[1], "paged": case.paged, "page_size": case.page_size}
    row |= {"config": dataclasses.asdict(case.config)} if case.config else {}
    row["memory"] = nbytes + kernel.memory_analysis().temp_size_in_bytes
    if setting.gpu:
        want = compiled("reference")(*inputs[0])
        row |= agreement(kernel(*inputs[0]), kernel(*inputs[0]), want, operation.tolerance(case))
    timing = time_jax(kernel, inputs)
    yield row | timing.as_dict() | setting.floor(timing.us, nbytes, shape.operations)


def random_pages(case: Case, copies: int) -> tuple[Pages, list[jax.Array]]:
    """Pools of random bytes and positive scales for several copies of a case, and the block table of each copy."""
    key, value = (spec.format for spec in case.specs)
    shape, size = case.shape, case.page_size
    count = copies * shape.batch * (shape.seq // size)
    shapes = jax.eval_shape(lambda: empty_pages(count, shape.kv_heads, size, key, value))
    leaves, tree = jax.tree.flatten(shapes)

    seeds = jax.random.split(jax.random.key(0), len(leaves))
    pages = tree.unflatten(
        [random_array(seed, leaf.shape, leaf.dtype) for seed, leaf in zip(seeds, leaves, strict=True)]
    )
    order = np.random.default_rng(0).permutation(count) if case.paged else np.arange(count)
    return pages, list(jnp.asarray(order.reshape(copies, shape.batch, -1), jnp.int32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random bytes for uint8, bits of normal bfloat16 numbers for uint16, and positive scales for floats."""
    if dtype == jnp.uint8:
        return jax.random.bits(key, shape, jnp.uint8)
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(jax.random.normal(key, shape, jnp.bfloat16), jnp.uint16)
    return jax.random.uniform(key, shape, jnp.float32, 8.0, 14.0).astype(dtype)


def agreement(got: Partial, again: Partial, want: Partial, tolerance: float) -> Row:
    """Relative error to the reference, and whether two runs give equal bits."""

    def normalized(partial: Partial) -> jax.Array:
        return partial.acc / jnp.where(partial.total > 0, partial.total, 1.0)[..., None]

    error = float(jnp.linalg.norm(normalized(got) - normalized(want)) / jnp.linalg.norm(normalized(want)))
    same = bool(jnp.array_equal(got.acc, again.acc))
    return {"error": error, "same_twice": same, "ok": same and error <= tolerance}
