"""The byte layout of quantized vectors: planes of 8, 4, 2 and 1 bits of each code.

A code of `bits` bits is cut into planes whose widths are the powers of two that sum to `bits`. The widest plane comes
first and holds the lowest bits: 3 bits are a 2-bit plane (bits 0-1) followed by a 1-bit plane (bit 2), 5 bits a 4-bit
and a 1-bit plane. A plane of width w stores 8/w codes per byte and takes n = ceil(dim * w / 8) bytes. Byte j holds
channel j in its lowest w bits, channel j + n in the next w, and so on, so that each field (the same w bits of all
bytes) is a run of consecutive channels:

    4 bits, dim 128 (64 bytes)          byte j = | ch j+64 | ch j |
    2 bits, dim 128 (32 bytes)          byte j = | ch j+96 | ch j+64 | ch j+32 | ch j |
    3 bits, dim 128 (48 bytes)          bytes 0-31: bits 0-1 as above; bytes 32-47: bit 2 of channels j + 16 i

A byte never holds two tokens, so writing a token writes whole bytes. If dim is not a multiple of 8/w, zero bits pad the
last fields.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes that hold a code of `bits` bits, in storage order.

    Args:
        bits: Bits per code, 0 to 8.

    Raises:
        NotImplementedError: For other widths.

    Example:
        >>> plane_widths(3), plane_widths(4), plane_widths(7)
        ((2, 1), (4,), (4, 2, 1))
    """
    if not 0 <= bits <= 8:
        raise NotImplementedError(f"codes of 0 to 8 bits are supported, got bits={bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def plane_layout(bits: int, dim: int) -> tuple[tuple[int, int, int], ...]:
    """Width, first byte and bytes of each plane of the codes of a vector.

    Args:
        bits: Bits per code, 0 to 8.
        dim: Codes per vector.

    Raises:
        NotImplementedError: For other widths.

    Example:
        >>> plane_layout(3, 128)
        ((2, 0, 32), (1, 32, 16))
    """
    planes, start = [], 0
    for width in plane_widths(bits):
        size = -(-dim * width // 8)
        planes.append((width, start, size))
        start += size
    return tuple(planes)


def packed_bytes(dim: int, bits: int) -> int:
    """Bytes that the packed codes of one vector take.

    Args:
        dim: Codes per vector.
        bits: Bits per code.

    Example:
        >>> packed_bytes(128, 3), packed_bytes(128, 4), packed_bytes(80, 1)
        (48, 64, 10)
    """
    return sum(size for _, _, size in plane_layout(bits, dim))


def pack(codes: UInt8[Array, "*batch dim"], bits: int) -> UInt8[Array, "*batch bytes"]:
    """Packs codes below 2**bits along the last axis.

    Args:
        codes: One code per byte.
        bits: Bits per code, 0 to 8.

    Returns:
        The packed bytes, `packed_bytes(dim, bits)` per vector.

    Example:
        >>> pack(jnp.array([1, 2, 3, 4], jnp.uint8), 4)
        Array([49, 66], dtype=uint8)
    """
    dim, planes, shift = codes.shape[-1], [], 0
    for width, _, size in plane_layout(bits, dim):
        fields = (codes >> shift) & ((1 << width) - 1)
        padding = [(0, 0)] * (codes.ndim - 1) + [(0, size * (8 // width) - dim)]
        fields = jnp.pad(fields, padding).reshape(*codes.shape[:-1], 8 // width, size)
        plane = fields[..., 0, :]  # [*batch, size]
        for i in range(1, 8 // width):
            plane = plane | (fields[..., i, :] << (i * width))
        planes.append(plane)
        shift += width
    return jnp.concatenate(planes, axis=-1) if planes else jnp.zeros((*codes.shape[:-1], 0), jnp.uint8)


def unpack(packed: UInt8[Array, "..."], bits: int, dim: int, *, axis: int = -1) -> UInt8[Array, "..."]:
    """Inverse of `pack`.

    Args:
        packed: Packed bytes along `axis`.
        bits: Bits per code.
        dim: Codes per vector.
        axis: Axis of the bytes, which becomes the axis of the codes; counted from the end, so negative.

    Returns:
        The codes, one per byte.

    Raises:
        ValueError: If the axis is not `packed_bytes(dim, bits)` long.

    Example:
        >>> unpack(jnp.array([49, 66], jnp.uint8), 4, 4)
        Array([1, 2, 3, 4], dtype=uint8)
    """
    if packed.shape[axis] != packed_bytes(dim, bits):
        raise ValueError(
            f"expected {packed_bytes(dim, bits)} bytes for dim={dim}, bits={bits}; got an axis of {packed.shape[axis]}"
        )
    lead, trail = packed.shape[: packed.ndim + axis], packed.shape[packed.ndim + axis + 1 :]
    codes = jnp.zeros((*lead, dim, *trail), jnp.uint8)
    shift = 0
    for width, start, size in plane_layout(bits, dim):
        fields = 8 // width
        plane = lax.slice_in_dim(packed, start, start + size, axis=axis)
        # Channel i * size + j is field i of byte j, so one broadcast shift and a free reshape unpack all fields.
        shifts = np.arange(0, 8, width, dtype=np.uint8).reshape((1,) * len(lead) + (fields, 1) + (1,) * len(trail))
        spread = (plane.reshape(*lead, 1, size, *trail) >> shifts) & ((1 << width) - 1)
        spread = spread.reshape(*lead, fields * size, *trail)
        codes = codes | (lax.slice_in_dim(spread, 0, dim, axis=axis) << shift)
        shift += width
    return codes
