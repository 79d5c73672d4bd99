"""Claims about whole models, each for one device, and their figures from rows."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from tq_jax.commands.bench.claims import Ratio
from tq_jax.commands.bench.job import Row
from tq_jax.commands.claims import Claim


@dataclasses.dataclass(frozen=True)
class Limit:
    """A bound on one figure of a row.

    Attributes:
        name: What is claimed.
        fields: Fields of the row.
        relation: Relation that must hold between figure and bound.
        bound: The bound.
        figure: Name of the figure.
        unit: What one of the bound is, in units of the figure.
    """

    name: str
    fields: Row
    relation: Literal["<=", ">="]
    bound: float
    figure: str = "us"
    unit: float = 1.0

    def measure(self, rows: Iterable[Row]) -> Claim | None:
        """The claim with its figure from rows; None if the row is missing.

        Args:
            rows: Rows that were measured.

        Example:
            >>> Limit("fast", {"op": "model"}, "<=", 2.0, unit=1e3).measure([{"op": "model", "us": 1500.0}]).figure
            1.5
        """
        found = [row[self.figure] / self.unit for row in rows if self.fields.items() <= row.items()]
        return Claim(self.name, found[0], self.relation, self.bound) if found else None


def _cache(bits: int | None) -> dict[str, str]:
    name = f"mse{bits}" if bits else "bf16"
    return {"key": name, "value": name}


def _fields(shape: str, batch: int, seq: int, bits: int | None) -> Row:
    return {"op": "model", "shape": shape, "batch": batch, "seq": seq, **_cache(bits)}


def _token(shape: str, batch: int, seq: int, bits: int, bound: float) -> Limit:
    name = f"{shape} {batch} x {seq}, K{bits}/V{bits}: milliseconds per token"
    return Limit(name, _fields(shape, batch, seq, bits), "<=", bound, unit=1e3)


def _prompt(shape: str, batch: int, seq: int, bound: float) -> Limit:
    fields = {"op": "prompt", "shape": shape, "batch": batch, "seq": seq}
    return Limit(f"{shape} prompt {batch} x {seq}: seconds", fields, "<=", bound, figure="s")


def _over_bf16(
    shape: str, batch: int, seq: int, bits: int, *, bound: float, relation: Literal["<=", ">="], faster: bool
) -> Ratio:
    """A bound on the speedup over the bfloat16 cache in the same loop, or on the time relative to it."""
    pair = _fields(shape, batch, seq, None), _fields(shape, batch, seq, bits)
    words = "times faster than the bf16 cache" if faster else "time over that of the bf16 cache"
    over, under = pair if faster else pair[::-1]
    return Ratio(f"{shape} {batch} x {seq}, K{bits}/V{bits}: {words}", over, under, relation, bound)


def _many(shape: str, rows: int, bound: float) -> Limit:
    fields = {"op": "many", "shape": shape, "batch": rows}
    name = f"{shape}, many mixed prompts over {rows} rows: tokens per second over those of a full batch"
    return Limit(name, fields, ">=", bound, figure="over_full")


CLAIMS: dict[str, tuple[Limit | Ratio, ...]] = {
    "H200": (
        _token("llama3-8b", 1, 1024, 4, 4.7),
        _token("llama3-8b", 8, 32768, 4, 7.4),
        _token("llama3-8b", 8, 32768, 2, 6.7),
        _token("llama3-8b", 1, 131072, 4, 6.3),
        _token("llama3-8b", 64, 4096, 4, 8.6),
        _over_bf16("llama3-8b", 8, 32768, 4, bound=2.2, relation=">=", faster=True),
        _prompt("llama3-8b", 1, 8192, 0.21),
        _prompt("llama3-8b", 1, 32768, 1.2),
        _over_bf16("smollm2", 1, 8192, 4, bound=1.0, relation="<=", faster=False),
        _many("llama3-8b", 16, 0.85),
        _many("smollm2", 16, 0.85),
    )
}
"""Every claim, by a part of the name of the device that it is for."""


def measure(rows: Sequence[Row], device: str) -> tuple[list[Claim], list[str]]:
    """The claims for a device whose rows were measured, and the names of its other claims.

    All claims are of one device: rows of a mesh of several count for none.

    Args:
        rows: Rows of the command.
        device: Kind of the device.
    """
    measured = [row for row in rows if "error" not in row and "mesh" not in row]
    claims = [claim for name, found in CLAIMS.items() if name in device for claim in found]
    figures = {claim.name: claim.measure(measured) for claim in claims}
    return [claim for claim in figures.values() if claim], [name for name, claim in figures.items() if not claim]
