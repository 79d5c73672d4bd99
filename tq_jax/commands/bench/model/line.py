"""Time per token as a straight line over the context, beside the lines that vLLM publishes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tq_jax.commands.bench.job import Row


@dataclasses.dataclass(frozen=True)
class Line:
    """Milliseconds per token of one sequence: intercept + slope * tokens of context.

    Attributes:
        intercept_ms: Milliseconds per token without context.
        slope_ms: Milliseconds per token and token of context.
    """

    intercept_ms: float
    slope_ms: float

    def at(self, tokens: float) -> float:
        """Milliseconds per token at a context.

        Args:
            tokens: Tokens of context.

        Example:
            >>> Line(6.0, 1e-4).at(10_000)
            7.0
        """
        return self.intercept_ms + self.slope_ms * tokens

    def scaled(self, factor: float) -> "Line":
        """The line with all times multiplied.

        Args:
            factor: The factor.
        """
        return Line(self.intercept_ms * factor, self.slope_ms * factor)


VLLM_SHAPE = "llama3-8b"
VLLM = {"bf16": Line(6.44, 4.37e-5), "fp8": Line(6.58, 2.37e-5)}
"""vLLM's lines for Llama-3.1-8B, one request on one H100, by the type of its cache."""

VLLM_SOURCE = "vLLM blog, 2026-04-22: Llama-3.1-8B, one request, one H100"
BANDWIDTH = {"H100": 3.35, "H200": 4.8}
"""Memory bandwidth of devices in TB/s, from NVIDIA's data sheets; used only to scale vLLM's lines."""


def least_squares(points: Sequence[tuple[float, float]]) -> Line | None:
    """The line of least squared errors; None unless there are two different contexts.

    Args:
        points: Tokens of context, and milliseconds per token.

    Example:
        >>> least_squares([(0, 5.0), (1000, 6.0), (2000, 7.0)])
        Line(intercept_ms=5.0, slope_ms=0.001)
    """
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return Line(mean_y - slope * mean_x, slope)


def fit_lines(rows: Sequence[Row]) -> list[Row]:
    """Lines over the contexts of one sequence, for every decoder and cache with at least two contexts.

    Args:
        rows: Rows of the command, whatever they measure.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["op"] == "model" and row["batch"] == 1 and "us" in row:
            found.setdefault((row["shape"], row["key"], row["value"]), []).append(row)
    lines = []
    for (shape, key, value), chosen in found.items():
        line, floor = (least_squares([(row["seq"], row[name] / 1e3) for row in chosen]) for name in ("us", "floor_us"))
        if line is not None and floor is not None:
            fields = {"shape": shape, "key": key, "value": value, "contexts": sorted(row["seq"] for row in chosen)}
            lines.append(fields | dataclasses.asdict(line) | {"floor": dataclasses.asdict(floor)})
    return lines


def published_lines(device: str) -> list[dict[str, Any]]:
    """Gives vLLM's lines as published, and scaled by bandwidth if the device is a known one other than an H100.

    Args:
        device: Kind of the device.

    Example:
        >>> [(line["cache"], line["scaled_to"]) for line in published_lines("NVIDIA H200")]
        [('bf16', None), ('fp8', None), ('bf16', 'H200'), ('fp8', 'H200')]
    """
    common = {"impl": "vllm", "shape": VLLM_SHAPE, "source": VLLM_SOURCE}
    lines = [common | {"cache": name, "scaled_to": None} | dataclasses.asdict(line) for name, line in VLLM.items()]
    for other in (name for name in BANDWIDTH if name in device and name != "H100"):
        for name, line in VLLM.items():
            scaled = line.scaled(BANDWIDTH["H100"] / BANDWIDTH[other])
            lines.append(common | {"cache": name, "scaled_to": other} | dataclasses.asdict(scaled))
    return lines
