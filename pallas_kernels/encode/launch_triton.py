"""Launch of the Pallas Triton encode kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import interprets
from pallas_kernels.encode import channel_quads_triton as channel_quads
from pallas_kernels.encode.arguments import EncodeArguments, ExactTokens
from pallas_kernels.encode.config import EncodeConfig, default_config, takes_one_token
from pallas_kernels.encode.encoder import Encoder
from pallas_kernels.encode.kernel_triton import encode_tiles
from pallas_kernels.encode.loads_triton import padded_size
from pallas_kernels.encode.plan import EncodeInputs, EncodePlan
from pallas_kernels.encode.reference import INVERSE_MULTIPLES
from pallas_kernels.encode.rotate_triton import MATRIX_GAIN
from pallas_kernels.format import Code, CodebookFormat, GroupFormat
from pallas_kernels.packing import pack, packed_bytes, plane_widths
from pallas_kernels.pages import Pages
from pallas_kernels.tiles.pool_ref import addressed

DIMS = (64, 80, 96, 128, 192, 256)
"""Head dims that the tests cover."""

BITS = (0, 1, 2, 3, 4, 5, 8)
"""Bits per code; codes of 7 bits, those of Prod with 8, would not fit into registers."""

LEAST_COLUMNS = 64
"""Least bytes of a packing product, eight per warp: a warp without bytes would compute all codes a second time."""

LEAST_ROW = 16
"""Tokens per row below which a tile may hold tokens of several rows."""


def encode_pages(
    arguments: EncodeArguments,
    pages: Pages,
    *,
    config: EncodeConfig | None = None,
    interpret: bool | None = None,
) -> Pages:
    """Encodes tokens into pages with the kernel; see `pallas_kernels.encode.encode_pages`.

    Args:
        arguments: The tokens.
        pages: The pools.
        config: Tile sizes; by default chosen for the number of tokens.
        interpret: Whether to run the kernel as jnp; by default where JAX has no GPU.

    Raises:
        NotImplementedError: If a shape or a format is outside the limits of the kernel.
    """
    return encode_and_copy(arguments, pages, None, config=config, interpret=interpret)[0]


def encode_and_copy(
    arguments: EncodeArguments,
    pages: Pages,
    exact: ExactTokens | None,
    *,
    config: EncodeConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Pages, ExactTokens | None]:
    """Encodes tokens into pages and copies some of them as they are, by the same launches.

    Args:
        arguments: The tokens. Their heads axis may be longer than the pages': only the first heads are read.
        pages: The pools.
        exact: Pools of tokens in full precision, and which tokens go there; None for none.
        config: As for `encode_pages`.
        interpret: As for `encode_pages`.

    Returns:
        The pools, which are updated in place.

    Raises:
        NotImplementedError: If a shape or a format is outside the limits of the kernel.
    """
    check_supported(pages, arguments.key, arguments.value)
    interpret = interprets() if interpret is None else interpret
    keys, values, slots = arguments.keys, arguments.values, arguments.slots.astype(jnp.int32)
    # One launch encodes both only if their tiles are equal.
    single = takes_one_token(arguments.key) and takes_one_token(arguments.value)
    options: dict[str, Any] = dict(rows=arguments.rows, config=config, single=single, interpret=interpret)
    if keys.size == 0 or not pages.keys.scale.size:
        return pages, exact
    statistics = arguments.mean, arguments.weight
    shapes, first = pages.page_shapes, len(jax.tree.leaves(pages.keys))
    key_pool = _Pool(pages.keys, shapes[:first], pages.page_size)
    value_pool = _Pool(pages.values, shapes[first:], pages.page_size)
    tasks = [
        _task(keys, key_pool, slots, arguments.key, *statistics, channel_major=False, **options),
        _task(values, value_pool, slots, arguments.value, None, None, channel_major=True, **options),
    ]
    if exact is not None:
        copied = (exact.keys, exact.values)
        tasks = [task.with_copies(pool, exact.places) for task, pool in zip(tasks, copied, strict=True)]
    # A launch takes longer than encoding a few tokens.
    together = tasks[0].plan.flat and tasks[0].config == tasks[1].config
    made = _launch(*tasks) if together else [_launch(task)[0] for task in tasks]
    pages = dataclasses.replace(pages, keys=made[0][0], values=made[1][0])
    return pages, None if exact is None else dataclasses.replace(exact, keys=made[0][1], values=made[1][1])


def encode_pool(
    x: Float[Array, "b t h d"],
    pool: Code,
    slots: Int[Array, "b t"],
    encoder: Encoder,
    mean: Float[Array, "b h d"] | None,
    weight: Float[Array, "b h d"] | None,
    *,
    channel_major: bool,
    config: EncodeConfig | None = None,
    interpret: bool = False,
) -> Code:
    """Encodes keys or values into their pool.

    Args:
        x: Keys or values, any float type.
        pool: Pool of pages.
        slots: int32, the page slot of each token.
        encoder: The encoder.
        mean: Subtracted from the vectors.
        weight: Factor of the centred vectors; given exactly if the mean is given.
        channel_major: Whether bytes come before tokens in a page.
        config: Tile sizes; by default chosen for the number of tokens.
        interpret: Whether to run the kernel as jnp.
    """
    single = takes_one_token(encoder)
    options: dict[str, Any] = dict(channel_major=channel_major, config=config, single=single, interpret=interpret)
    whole = _Pool(pool, tuple(array.shape[1:] for array in jax.tree.leaves(pool)), pool.scale.shape[-1])
    return _launch(_task(x, whole, slots, encoder, mean, weight, **options))[0][0]


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Keys or values of pages, the shape of each of their arrays in one page, and the tokens per page."""

    arrays: Code
    shapes: tuple[tuple[int, ...], ...]
    page_size: int

    @property
    def kv_heads(self) -> int:
        """KV heads: the first axis of every array in a page."""
        return self.shapes[0][0]


@dataclasses.dataclass(frozen=True)
class _Task:
    """Vectors, the pool that they are encoded into, and that of tokens in full precision."""

    inputs: EncodeInputs
    pool: _Pool
    plan: EncodePlan
    config: EncodeConfig
    exact: Array | None = None

    def with_copies(self, exact: Array, places: Array) -> "_Task":
        """The task with copies of its tokens."""
        return dataclasses.replace(self, exact=exact, inputs=dataclasses.replace(self.inputs, places=places))


def _task(
    x: Array,
    pool: _Pool,
    slots: Array,
    encoder: Encoder,
    mean: Array | None,
    weight: Array | None,
    *,
    channel_major: bool,
    rows: Array | None = None,
    config: EncodeConfig | None,
    single: bool,
    interpret: bool,
) -> _Task:
    """The task of encoding keys or values; arguments as of `encode_pool`, `EncodeArguments.rows`, `default_config`."""
    batch, tokens, _, dim = x.shape
    fmt = encoder.format
    flat = tokens < LEAST_ROW
    config = config or default_config(batch * tokens if flat else tokens, encoder, single=single and flat)
    if config.tile == 1 and not takes_one_token(encoder):
        raise NotImplementedError(
            f"programs of one token (tile=1) encode Hadamard-rotated codes in channel quads without a sketch, "
            f"got {encoder.format}"
        )
    plan = EncodePlan(
        fmt=fmt,
        scale=encoder.scale,
        search=encoder.search and any(book.bits > 1 for book in getattr(fmt, "segments", ())),
        factor=float(np.float32(dim**-0.5)) if encoder.hadamard else 1 / MATRIX_GAIN,
        channel_major=channel_major,
        page_size=pool.page_size,
        pools=addressed(pool.arrays, pool.shapes)[1],
        rows=batch,
        tokens=tokens,
        tile=config.tile,
        chunk=min(config.chunk, padded_size(dim)),
        flat=flat,
        planes=_vector_planes(x, encoder, centred=mean is not None),
        hadamard=encoder.hadamard,
        width=channel_quads.tile_width(encoder),
        interpret=interpret,
    )
    return _Task(_inputs(x, slots, encoder, mean, weight, rows, plan), pool, plan, config)


def _launch(*tasks: _Task) -> list[tuple[Code, Any]]:
    """The pools after one launch for all tasks; several tasks share a launch only if their plans are flat.

    Returns:
        Of each task the pool, and that of its tokens in full precision, or None.
    """
    plan, config = tasks[0].plan, tasks[0].config
    inputs = [task.inputs for task in tasks]
    stored = [(addressed(task.pool.arrays, task.pool.shapes)[0], task.exact) for task in tasks]
    first = len(jax.tree.leaves(inputs))
    blocks = pl.cdiv(plan.rows * plan.tokens if plan.flat else plan.tokens, config.tile)
    [new] = pl.pallas_call(
        functools.partial(encode_tiles, plans=tuple(task.plan for task in tasks)),
        grid=(tasks[0].pool.kv_heads, blocks, len(tasks) if plan.flat else plan.rows),
        out_shape=[jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), stored)],
        input_output_aliases={first + i: i for i in range(len(jax.tree.leaves(stored)))},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=plan.interpret,
        name="encode",
    )(inputs, stored)
    return [(_in_place_of(task.pool.arrays, code), exact) for task, (code, exact) in zip(tasks, new, strict=True)]


def _in_place_of(pool: Code, made: Code) -> Code:
    """The arrays that a launch wrote, in the shapes that they had before; those without elements as they were."""
    found = {name: (old, getattr(made, name)) for name, old in vars(pool).items()}
    return Code(**{name: old if new is None else new.reshape(old.shape) for name, (old, new) in found.items()})


def _vector_planes(x: Array, encoder: Encoder, *, centred: bool) -> int:
    """Number of fp16 planes that hold the vectors, up to float32 rounding; 0 if bfloat16 is multiplied as it is."""
    if centred or x.dtype not in (jnp.bfloat16, jnp.float16):
        return 2
    return 0 if x.dtype == jnp.bfloat16 and encoder.hadamard else 1


def _inputs(
    x: Array,
    slots: Array,
    encoder: Encoder,
    mean: Array | None,
    weight: Array | None,
    rows: Array | None,
    plan: EncodePlan,
) -> EncodeInputs:
    """Arrays of the kernel; arguments are those of `_task`."""
    fmt = plan.fmt
    matrices: list[tuple[Array, ...]] = []
    if isinstance(fmt, GroupFormat):
        packers = [_packers(fmt.dim, fmt.bits)]
    else:
        packers = [_packers(book.dim, book.bits, LEAST_COLUMNS) for book in fmt.segments]
        start = 0
        matrix = encoder.matrix
        for book in fmt.segments if matrix is not None else ():
            part = matrix[:, start : start + book.dim]  # pyright: ignore[reportOptionalSubscript]
            if plan.width and plan.hadamard:
                part = part[:, : plan.width]
            matrices.append(_planes(part, encoder.hadamard, bfloat16=plan.planes == 0))
            start += book.dim
    inverse = np.pad(INVERSE_MULTIPLES, (0, 64 - len(INVERSE_MULTIPLES)))
    return EncodeInputs(
        x=x,
        slots=slots,
        mean=None if mean is None else mean.astype(jnp.float32),
        weight=None if weight is None else weight.astype(jnp.float32),
        rows=None if mean is None or rows is None else rows.astype(jnp.int32),
        matrices=tuple(matrices),
        packers=tuple(packers),
        sketch=() if encoder.sketch is None else _planes(_by_bits(encoder.sketch.T), False, bfloat16=False),
        inverse=jnp.asarray(inverse) if plan.search else None,
    )


def _by_bits(columns: Float[Array, "m n"]) -> Float[Array, "m padded"]:
    """Columns in the order of the bits of packed signs, bit 0 of every byte first, padded to whole tiles of bytes."""
    size = columns.shape[1] // 8
    split = columns.reshape(-1, 8, size)
    return jnp.pad(split, ((0, 0), (0, 0), (0, padded_size(8 * size) // 8 - size))).reshape(columns.shape[0], -1)


def _planes(matrix: Float[Array, "m n"], signs: bool, *, bfloat16: bool) -> tuple[Array, ...]:
    """The padded planes of a matrix that the kernel multiplies by; one plane if `signs`, for a matrix of signs."""
    padded = jnp.pad(matrix.astype(jnp.float32), [(0, padded_size(n) - n) for n in matrix.shape])
    if signs:
        return (jnp.sign(padded).astype(jnp.bfloat16 if bfloat16 else jnp.float16),)
    padded = padded * MATRIX_GAIN
    high = padded.astype(jnp.float16)
    return high, (padded - high.astype(jnp.float32)).astype(jnp.float16)


@functools.lru_cache(maxsize=64)
def _packer_tables(dim: int, bits: int, least: int) -> tuple[np.ndarray, ...]:
    """The packer of each plane of a code: row i is the bytes that `pack` makes of a 1 in channel i, padded.

    Args:
        dim: Channels.
        bits: Bits per code.
        least: Least columns.
    """
    tables, start = [], 0
    with jax.ensure_compile_time_eval():
        for width in plane_widths(bits):
            units = pack(jnp.eye(dim, dtype=jnp.uint8) << start, bits)
            first = packed_bytes(dim, bits & -(2 * width)) if width < 8 else 0
            table = np.asarray(units)[:, first : first + packed_bytes(dim, width)]
            rows, columns = table.shape
            tables.append(
                np.pad(table, ((0, padded_size(rows) - rows), (0, max(least, padded_size(columns)) - columns)))
            )
            start += width
    return tuple(table.astype(np.float16) for table in tables)


def _packers(dim: int, bits: int, least: int = 0) -> tuple[Array, ...]:
    """The tables of `_packer_tables` as arrays; none for codes that are bytes already."""
    return () if bits in (0, 8) else tuple(jnp.asarray(table) for table in _packer_tables(dim, bits, least))


def check_supported(pages: Pages, key: Encoder, value: Encoder) -> None:
    """Raises NotImplementedError, naming the value and the limit, if the kernel does not support the case."""
    for fmt in (key.format, value.format):
        if fmt.dim not in DIMS:
            raise NotImplementedError(f"the Triton kernel encodes head dims {DIMS}, got {fmt.dim}")
        if isinstance(fmt, CodebookFormat) and any(book.bits not in BITS for book in fmt.segments):
            raise NotImplementedError(
                f"the Triton kernel encodes codes of {BITS} bits, got {[book.bits for book in fmt.segments]}"
            )
        if isinstance(fmt, GroupFormat) and fmt.group & (fmt.group - 1):
            raise NotImplementedError(f"the Triton kernel encodes groups of a power of two, got group={fmt.group}")
    if isinstance(value.format, CodebookFormat) and value.format.residual:
        raise NotImplementedError("the Triton kernel encodes values without a sketch, got a residual")
