"""TurboQuant vector quantizers as pure functions over pytrees.

A `QuantizerSpec` says what to do, `make_quantizer` draws the random parts once, and `quantize`, `dequantize` and
`inner_product` work on batches of vectors, under jit, vmap, scan and shard_map as well.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.scipy.linalg import block_diag
from jaxtyping import Array, Float, Int

from pallas_kernels.encode import Encoder, encode
from pallas_kernels.format import Code, CodebookFormat, GroupFormat, ScaleDtype, ScaleRule, VectorFormat
from pallas_kernels.lookup import decode, residual_signs
from pallas_kernels.packing import packed_bytes
from pallas_kernels.pytree import pytree
from tq_jax import rotation as rot
from tq_jax.codebook import codebook
from tq_jax.plain import flag, make_plain, number, whole

Kind = Literal["mse", "prod", "group"]
MIN_DIM, MAX_DIM = 16, 512
INTEGER_BITS = (1, 2, 3, 4, 5, 8)
FRACTIONAL_BITS = (2.5, 3.5)
GROUP_BITS = (2, 4)


@dataclasses.dataclass(frozen=True)
class QuantizerSpec:
    """The choices that make a quantizer; static and hashable.

    See `recommended_quantizers` for the specs that measurements use.

    Attributes:
        dim: Dimensions of a vector, 16 to 512.
        bits: Bits per coordinate: 1, 2, 3, 4, 5, 8, or 2.5 and 3.5 (a quarter of the channels, the outliers, get one
            bit more than the others; kind "mse" only); 2 or 4 for kind "group".
        kind: "mse" (arXiv 2504.19874, Algorithm 1), "prod" (Algorithm 2: bits - 1 bits and the signs of a Gaussian
            sketch of the residual, unbiased for inner products) or "group" (min-max codes in groups, not rotated).
        rotation: "hadamard" or "haar", see `tq_jax.rotation`.
        scale: Which scalar is stored with the centroid vector q of the rotated vector y: "norm" |y| (as published),
            "matched" |y| / |q|, "least_squares" <y, q> / |q|^2 (least error), "unbiased" |y|^2 / <y, q> (the estimate
            of <x, x> is exact; arXiv 2604.18555). None means "norm" for kind "prod" and "least_squares" for the others;
            for the "mse" keys of a `CacheSpec` it means "unbiased".
        search: Whether multiples of the codebook's step are tried for every vector, from coarse to fine, and the one
            of least squared error is kept (to three digits the error of trying 31 of them one by one).
        group: Channels that share a scale and a zero (kind "group").
        scale_dtype: Type of stored scalars. float16 holds norms up to 65504.

    Raises:
        ValueError: For values and combinations that do not exist.
        NotImplementedError: For widths and dimensions outside the limits above.

    Example:
        >>> QuantizerSpec(dim=128, bits=3).bytes_per_vector
        50
    """

    dim: int
    bits: float = 4
    kind: Kind = "mse"
    rotation: rot.RotationKind = "hadamard"
    scale: ScaleRule | None = None
    search: bool = False
    group: int = 32
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        require_choices(
            self,
            kind=get_args(Kind),
            rotation=get_args(rot.RotationKind),
            scale=(None, *get_args(ScaleRule)),
            scale_dtype=get_args(ScaleDtype),
        )
        make_plain(self, dim=whole, bits=number, search=flag, group=whole)
        require_dim(self.dim, MIN_DIM, MAX_DIM, above="; tq_jax.search.IndexSpec takes wider vectors")
        widths = {"mse": INTEGER_BITS + FRACTIONAL_BITS, "prod": INTEGER_BITS, "group": GROUP_BITS}[self.kind]
        if self.bits not in widths:
            raise NotImplementedError(f"kind={self.kind!r} has bits in {widths}, got bits={self.bits!r}")
        if self.bits in FRACTIONAL_BITS and self.dim % 4:
            raise NotImplementedError(f"bits={self.bits} needs a dim that 4 divides, got dim={self.dim}")
        if self.kind == "group" and (self.group < 1 or self.dim % self.group):
            raise ValueError(f"expected a group that divides dim={self.dim}, got group={self.group}")
        if self.search and (self.kind == "group" or self.scale_rule == "norm"):
            raise ValueError(
                f"expected search=False for kind={self.kind!r} with scale={self.scale_rule!r}: "
                "the stored norm cannot carry the searched step; got search=True"
            )

    @property
    def scale_rule(self) -> ScaleRule:
        """The scale rule with None resolved."""
        return self.scale or ("norm" if self.kind == "prod" else "least_squares")

    @property
    def num_outliers(self) -> int:
        """Outlier channels, which get one bit more in a fractional width; 0 for whole widths."""
        return self.dim // 4 if self.bits in FRACTIONAL_BITS else 0

    @property
    def format(self) -> VectorFormat:
        """The layout of the stored bytes."""
        if self.kind == "group":
            return GroupFormat(self.dim, int(self.bits), self.group, self.scale_dtype)
        if self.num_outliers:
            low = math.floor(self.bits)
            books = codebook(self.num_outliers, low + 1), codebook(self.dim - self.num_outliers, low)
            return CodebookFormat(books, scale_dtype=self.scale_dtype)
        prod = self.kind == "prod"
        return CodebookFormat((codebook(self.dim, int(self.bits) - prod),), residual=prod, scale_dtype=self.scale_dtype)

    @property
    def bytes_per_vector(self) -> int:
        """Stored bytes of one vector, scales included."""
        return self.format.bytes_per_vector


def require_choices(spec: Any, **choices: tuple) -> None:
    """Makes each named attribute of a spec the choice that it equals; raises ValueError if there is none."""
    for name, allowed in choices.items():
        if getattr(spec, name) not in allowed:
            raise ValueError(f"expected {name} in {allowed}, got {getattr(spec, name)!r}")
        # A dtype equals its name, which files can hold.
        object.__setattr__(spec, name, allowed[allowed.index(getattr(spec, name))])


def require_dim(dim: int, least: int, most: int, *, above: str = "") -> None:
    """Raises NotImplementedError unless the dimensions of a vector are within limits; `above` is said of more."""
    if not least <= dim <= most:
        hint = above if dim > most else ""
        raise NotImplementedError(f"dim from {least} to {most} is supported, got dim={dim}{hint}")


@pytree
class Quantizer:
    """The random parts of a quantizer; a pytree. The codebook follows from the spec.

    Attributes:
        rotations: One rotation per segment of the format (see `tq_jax.rotation`); empty for kind "group".
        sketch: Gaussian matrix S [dim, dim] of kind "prod", in the rotated basis; None for other kinds.
        outliers: int32 [num_outliers], channels that get one bit more, ascending; None for whole widths.
        spec: The spec (static).
    """

    rotations: tuple[jax.Array, ...]
    sketch: jax.Array | None
    outliers: jax.Array | None
    spec: QuantizerSpec = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of rotations, sketch and codebooks."""
        arrays = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))
        books = getattr(self.spec.format, "segments", ())
        return arrays + sum(len(book.levels) + 4 for book in books)


def make_quantizer(spec: QuantizerSpec, *, seed: int = 0, outliers: Sequence[int] | None = None) -> Quantizer:
    """Draws the random parts of a quantizer; the same seed gives the same bytes everywhere.

    Args:
        spec: What the quantizer does.
        seed: An integer from 0 to 2**64 - 1. Rotations and sketch use independent streams of it.
        outliers: For fractional widths, the dim / 4 channels that get one bit more; `outlier_channels` finds them in
            data. By default the first dim / 4.

    Returns:
        The quantizer.

    Raises:
        ValueError: For a seed outside these limits or a wrong set of outliers.

    Example:
        >>> q = make_quantizer(QuantizerSpec(dim=128, bits=4, scale="unbiased", search=True), seed=0)
        >>> code = quantize(q, jnp.ones((2, 128)))
        >>> code.nbytes, dequantize(q, code).shape
        (132, (2, 128))
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ValueError(f"expected a seed of at least 0, an integer below 2**64, got {seed}")
    if outliers is None:
        outliers = range(spec.num_outliers)
    chosen = sorted(int(channel) for channel in outliers)
    if len(set(chosen)) != spec.num_outliers or any(not 0 <= channel < spec.dim for channel in chosen):
        raise ValueError(f"expected {spec.num_outliers} different channels below {spec.dim} as outliers, got {chosen}")
    books = getattr(spec.format, "segments", ())
    rotations = tuple(rot.random_rotation(spec.rotation, book.dim, (seed, 2 * i)) for i, book in enumerate(books))
    sketch = jnp.asarray(rot.gaussian((spec.dim, spec.dim), (seed, 1)), jnp.float32) if spec.kind == "prod" else None
    return Quantizer(rotations, sketch, jnp.asarray(chosen, jnp.int32) if chosen else None, spec)


def outlier_channels(x: Float[Array, "*batch dim"], count: int) -> Int[Array, "count"]:
    """Returns the channels of largest mean square, ascending: the outliers of a fractional width."""
    energy = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))
    return jnp.sort(lax.top_k(energy, count)[1])


def to_rotated(q: Quantizer, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Maps vectors to the basis that is quantized: outliers first, each segment rotated; float32.

    The map is orthogonal, so it keeps inner products: <x, y> = <to_rotated(x), to_rotated(y)>.
    """
    if q.outliers is None:
        return rot.rotate(q.rotations[0], x) if q.rotations else x.astype(jnp.float32)
    x = jnp.take(x, _order(q), axis=-1)
    first = q.spec.num_outliers
    return jnp.concatenate(
        [rot.rotate(q.rotations[0], x[..., :first]), rot.rotate(q.rotations[1], x[..., first:])], axis=-1
    )


def from_rotated(q: Quantizer, y: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Inverse of `to_rotated`."""
    if q.outliers is None:
        return rot.unrotate(q.rotations[0], y) if q.rotations else y
    first = q.spec.num_outliers
    x = [rot.unrotate(q.rotations[0], y[..., :first]), rot.unrotate(q.rotations[1], y[..., first:])]
    return jnp.take(jnp.concatenate(x, axis=-1), jnp.argsort(_order(q)), axis=-1)


def _order(q: Quantizer) -> Int[Array, "dim"]:
    """The order of channels in which the outliers come first."""
    assert q.outliers is not None
    rest = jnp.ones(q.spec.dim, jnp.int32).at[q.outliers].set(0)
    return jnp.argsort(rest, stable=True)


def quantize(q: Quantizer, x: Float[Array, "*batch dim"]) -> Code:
    """Quantizes vectors.

    The gradient is that of the stored scalars while the codes stay as they are; it is zero for a zero vector.

    Args:
        q: The quantizer.
        x: Vectors of any float type; the arithmetic is float32. A zero vector is stored exactly.

    Returns:
        The code, with the batch axes of x.

    Raises:
        ValueError: If the last axis is not spec.dim, x is not floating point, or, outside jit, a vector holds NaN or
            infinity or has a norm too large for scale_dtype. Under jit such a vector gets a NaN or infinite scale.
    """
    code = encode_rotated(q, to_rotated(q, checked(q, x)))
    require_finite(code, q.spec)
    return code


def encode_rotated(q: Quantizer, y: Float[Array, "*batch dim"]) -> Code:
    """Quantizes vectors that `to_rotated` has rotated."""
    return encode(y, q.spec.format, scale=q.spec.scale_rule, search=q.spec.search, sketch=q.sketch)


def encoder(q: Quantizer) -> Encoder:
    """The quantizer as the encode op takes it: one rotation matrix, order of outliers and segments included."""
    matrices = [rot.matrix(rotation) for rotation in q.rotations]
    matrix = None if not matrices else matrices[0] if len(matrices) == 1 else block_diag(*matrices)
    if q.outliers is not None and matrix is not None:
        matrix = matrix[jnp.argsort(_order(q))]
    dim = q.spec.dim
    hadamard = q.spec.rotation == "hadamard" and len(matrices) == 1 and dim & (dim - 1) == 0
    return Encoder(
        matrix,
        q.sketch,
        format=q.spec.format,
        scale=q.spec.scale_rule,
        search=q.spec.search,
        hadamard=hadamard,
    )


def checked(q: Quantizer, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Returns x, or raises ValueError if it is not a batch of float vectors of spec.dim channels."""
    if not hasattr(x, "ndim"):
        raise ValueError(f"expected an array of vectors of {q.spec.dim} channels, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != q.spec.dim:
        raise ValueError(f"expected vectors of {q.spec.dim} channels, got shape {tuple(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating point vectors, got dtype {x.dtype}")
    return x


def require_finite(code: Code, spec: QuantizerSpec) -> None:
    """Raises ValueError if a stored scalar is not finite; does nothing for traced values."""
    scalars = [s for s in (code.scale, code.zero, code.residual) if s is not None]
    if is_traced(scalars):
        return
    if not all(np.isfinite(np.asarray(s)).all() for s in scalars):
        raise ValueError(
            f"expected finite vectors whose scale fits {spec.scale_dtype} "
            f"(at most {np.finfo(spec.scale_dtype).max:.6g}); got NaN, infinity or a larger one"
        )


def is_traced(tree: Any) -> bool:
    """Whether a leaf of the tree has no value yet, so that it cannot be checked."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def dequantize(q: Quantizer, code: Code) -> Float[Array, "*batch dim"]:
    """Reconstructs vectors in the original basis, float32.

    Raises:
        ValueError: If the code does not fit the spec.
    """
    check_code(q.spec, code)
    y = decode(code, q.spec.format)
    if q.sketch is not None:
        assert isinstance(q.spec.format, CodebookFormat) and code.residual is not None
        back = jnp.einsum("...i,ij->...j", residual_signs(code, q.spec.format), q.sketch, precision="highest")
        y = y + back * (sketch_gain(q.spec.dim) * code.residual.astype(jnp.float32))[..., None]
    return from_rotated(q, y)


def inner_product(q: Quantizer, y: Float[Array, "*batch dim"], code: Code) -> Float[Array, "..."]:
    """Estimates <y, x> from the code of x, in the rotated basis; float32.

    Args:
        q: The quantizer that wrote the code.
        y: Queries; batch axes broadcast against those of the code.
        code: The code of x.

    Raises:
        ValueError: If y or the code does not fit the spec.

    Example:
        >>> q = make_quantizer(QuantizerSpec(dim=64, bits=4, scale="unbiased", scale_dtype="float32"))
        >>> x = jnp.sin(jnp.arange(64.0))
        >>> bool(jnp.allclose(inner_product(q, x, quantize(q, x)), jnp.sum(x * x), rtol=1e-5))
        True
    """
    check_code(q.spec, code)
    rotated = to_rotated(q, checked(q, y))
    product = jnp.einsum("...i,...i->...", rotated, decode(code, q.spec.format), precision="highest")
    if q.sketch is None:
        return product
    assert isinstance(q.spec.format, CodebookFormat) and code.residual is not None
    signs = residual_signs(code, q.spec.format) * code.residual.astype(jnp.float32)[..., None]
    sketched = jnp.einsum("...i,...i->...", sketch_query(q, rotated), signs, precision="highest")
    return product + sketched * sketch_gain(q.spec.dim)


def sketch_query(q: Quantizer, rotated: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Sketches S y of rotated queries y, to be multiplied with the stored signs."""
    assert q.sketch is not None
    return jnp.einsum("ij,...j->...i", q.sketch, rotated, precision="highest")


def sketch_gain(dim: int) -> float:
    """The factor of products with the signs of a Gaussian sketch, sqrt(pi/2) / dim (Algorithm 2, line 9)."""
    return math.sqrt(math.pi / 2) / dim


def check_code(spec: QuantizerSpec, code: Code) -> None:
    """Raises ValueError unless the arrays of a code have the shapes and types that the spec prescribes."""
    fmt = spec.format
    found = {name: array is not None for name, array in vars(code).items()}
    group, prod = isinstance(fmt, GroupFormat), spec.kind == "prod"
    wanted = {"packed": True, "scale": True, "zero": group, "signs": prod, "residual": prod}
    if found != wanted:
        raise ValueError(f"expected a code with {_names(wanted)} for kind={spec.kind!r}, got {_names(found)}")
    if code.packed.dtype != jnp.uint8 or code.packed.shape[-1:] != (fmt.packed_bytes,):
        raise ValueError(
            f"expected packed uint8 of {fmt.packed_bytes} bytes, got {code.packed.dtype} {code.packed.shape}"
        )
    batch = code.packed.shape[:-1]
    scales = batch + ((fmt.num_scales,) if group or fmt.num_scales > 1 else ())
    shapes = {"scale": scales, "zero": scales, "signs": (*batch, packed_bytes(fmt.dim, 1)), "residual": batch}
    for name, shape in shapes.items():
        array, dtype = getattr(code, name), "uint8" if name == "signs" else spec.scale_dtype
        if array is not None and (array.shape != shape or array.dtype != jnp.dtype(dtype)):
            raise ValueError(f"expected {name} {dtype} {shape}, got {array.dtype} {tuple(array.shape)}")


def _names(flags: dict[str, bool]) -> str:
    return ", ".join(name for name, present in flags.items() if present)
