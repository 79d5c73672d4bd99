"""Claims about the kernels, compared with peers and with each other, and their figures from rows."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tq_jax.commands.bench.job import Row
from tq_jax.commands.bench.shapes import DECODE, PREFILL, Shape
from tq_jax.commands.claims import Claim

CUDNN = ("cudnn_bf16", "jax_cudnn_bf16")
"""cuDNN by torch and by JAX; the faster one counts."""

FP8 = ("flashinfer_fp8",)
OURS = ("triton", "mosaic", "tq")
SAME = ("batch", "seq", "q_len", "q_heads", "kv_heads", "head_dim")
"""Fields that rows must agree in to be compared."""

PEERS_OF = {"attend": "decode"}
"""Operations that are compared with the peers of another operation."""


SHAPES, DIMS = ("batch 8", "batch 32", "long", "single"), ("dim 64", "dim 256")
"""Names of the shapes that are compared with peers, and of those of other head dims."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of one kind of device: the faster its memory, the less is won by reading fewer bytes.

    Attributes:
        cudnn: Least speedup over cuDNN in bfloat16 at 4, 3 and 2 bits, for each of SHAPES.
        fp8: Least speedup over FlashInfer in fp8 at 4 bits, for each of SHAPES; empty where it was never measured.
        dims: Least speedup over cuDNN in bfloat16 at 4 bits, for each of DIMS.
        verify: Most time of four queries over that of one.
        encode: Least speed of encoding without search, as a share of a copy's.
    """

    cudnn: tuple[tuple[float, float, float], ...]
    fp8: tuple[float, ...]
    dims: tuple[float, float]
    verify: float
    encode: float


H100 = Bounds(
    cudnn=((2.9, 3.0, 3.5), (2.9, 3.0, 3.5), (2.5, 2.6, 3.0), (2.0, 2.1, 2.2)),
    fp8=(1.9, 1.9, 1.7, 1.5),
    dims=(2.3, 2.3),
    verify=1.5,
    encode=0.5,
)
H200 = Bounds(
    ((2.6, 2.8, 3.5), (2.5, 2.7, 3.4), (2.5, 2.6, 3.3), (1.9, 1.9, 2.3)), (), (2.1, 2.3), verify=1.6, encode=0.37
)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A bound on the ratio of two rows' figures.

    Attributes:
        name: What is claimed.
        over: Fields of the numerator's row; a tuple lists alternatives, of which the fastest row counts.
        under: Fields of the denominator's row, in the same form.
        relation: Relation that must hold between ratio and bound.
        bound: The bound.
        figures: Names of the figures of numerator and denominator.
    """

    name: str
    over: Row
    under: Row
    relation: Literal["<=", ">="]
    bound: float
    figures: tuple[str, str] = ("us", "us")

    def measure(self, rows: Iterable[Row]) -> Claim | None:
        """The claim with its figure from rows; None if a row is missing.

        Example:
            >>> rows = [{"impl": "a", "us": 6.0}, {"impl": "b", "us": 2.0}]
            >>> Ratio("3 times faster", {"impl": "a"}, {"impl": ("b", "c")}, ">=", 3).measure(rows).ok
            True
        """
        over, under = (_find(rows, fields) for fields in (self.over, self.under))
        if over is None or under is None:
            return None
        return Claim(self.name, over[self.figures[0]] / under[self.figures[1]], self.relation, self.bound)


def _find(rows: Iterable[Row], fields: Row) -> Row | None:
    def agrees(row: Row) -> bool:
        wanted = ((row.get(name), value) for name, value in fields.items())
        return all(found in value if isinstance(value, tuple) else found == value for found, value in wanted)

    return min((row for row in rows if agrees(row)), key=lambda row: row["us"], default=None)


def _fields(
    shape: Shape, impl: Any, key: Any = None, value: Any = None, *, op: str = "decode", paged: bool | None = None
) -> Row:
    fields = {"op": op, "impl": impl, "key": key, "value": value, "paged": paged}
    return {name: field for name, field in fields.items() if field is not None} | shape.as_dict()


def _decode_ratios(bounds: Bounds) -> Iterable[Ratio]:
    for i, (name, least) in enumerate(zip(SHAPES, bounds.cudnn, strict=True)):
        shape = DECODE[name]
        for bits, bound in zip((4, 3, 2), least, strict=True):
            ours = _fields(shape, OURS, f"mse{bits}", f"mse{bits}", paged=True)
            label = f"decode {shape.label}, K{bits}/V{bits}: times faster than"
            yield Ratio(f"{label} cuDNN bf16", _fields(shape, CUDNN), ours, ">=", bound)
            if bits == 4 and bounds.fp8:
                yield Ratio(f"{label} FlashInfer fp8", _fields(shape, FP8), ours, ">=", bounds.fp8[i])
    shape = DECODE["batch 8"]
    ours, ordered = (_fields(shape, OURS, "mse4", "mse4", paged=paged) for paged in (True, False))
    yield Ratio(f"decode {shape.label}, K4/V4: time of shuffled pages over ordered ones", ours, ordered, "<=", 1.05)
    prod = _fields(shape, OURS, "prod3", "group2")
    yield Ratio(
        f"decode {shape.label}, prod 3, min-max 2: times faster than cuDNN bf16", _fields(shape, CUDNN), prod, ">=", 1.5
    )
    for name, bound in zip(DIMS, bounds.dims, strict=True):
        mine, cudnn = _fields(DECODE[name], OURS, "mse4", "mse4"), _fields(DECODE[name], CUDNN)
        yield Ratio(f"decode {DECODE[name].label}, K4/V4: times faster than cuDNN bf16", cudnn, mine, ">=", bound)
    verify = _fields(DECODE["verify"], OURS, "mse4", "mse4")
    yield Ratio(f"decode {shape.label}, K4/V4: time of 4 queries over that of 1", verify, ours, "<=", bounds.verify)


def _encode_ratio(bounds: Bounds) -> Ratio:
    row = {"op": "encode", "impl": OURS, "key": "mse4", "value": "mse4", "search": False, "vectors": 2**20}
    name = "encode a million vectors, K4/V4 without search: speed as a share of the copy's"
    return Ratio(name, row, row, ">=", bounds.encode, ("floor_us", "us"))


def _prefill_ratios() -> Iterable[Ratio]:
    shape = PREFILL["chunk"]
    ours = _fields(shape, OURS, "mse4", "mse4", op="prefill")
    cudnn = _fields(shape, CUDNN, op="prefill")
    name = f"prefill {shape.label}, K4/V4:"
    yield Ratio(f"{name} time over cuDNN bf16", ours, cudnn, "<=", 1.3)
    yield Ratio(f"{name} bytes of the prefix over those of bf16", ours, cudnn, "<=", 0.3, ("bytes", "bytes"))


def claims_for(device: str) -> tuple[Ratio, ...]:
    """Every claim about a kind of device; the bounds are those of an H100 for all but an H200.

    Args:
        device: Its name.

    Example:
        >>> len(claims_for("NVIDIA H100 80GB HBM3")) - len(claims_for("NVIDIA H200"))
        4
    """
    bounds = H200 if "H200" in device else H100
    return (*_decode_ratios(bounds), _encode_ratio(bounds), *_prefill_ratios())


def measure(rows: Sequence[Row], device: str) -> tuple[list[Claim], list[str]]:
    """The claims for a device whose rows were measured, and the names of its other claims."""
    measured = {ratio.name: ratio.measure(rows) for ratio in claims_for(device)}
    return [claim for claim in measured.values() if claim], [name for name, claim in measured.items() if not claim]


def add_ratios(rows: Sequence[Row]) -> None:
    """Adds "faster_than" to the project's rows: the speedup over each peer at the same shape."""
    for row in rows:
        if row["impl"] in OURS:
            peers = [other for other in rows if other["impl"] not in OURS and _same(row, other)]
            row["faster_than"] = {peer["impl"]: round(peer["us"] / row["us"], 2) for peer in peers}


def _same(a: Row, b: Row) -> bool:
    return PEERS_OF.get(a["op"], a["op"]) == b["op"] and all(a.get(name) == b.get(name) for name in SAME)
