"""The picture of `tq-jax bench model`: time per token against context, floors, other loads, and vLLM's lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tq_jax.commands.bench.job import Row
from tq_jax.commands.bench.model.line import VLLM_SHAPE, Line, least_squares
from tq_jax.commands.bench.model.report import cache_name

COLORS = ("#1b6ca8", "#c8553d", "#e0a458", "#5b8c5a", "#7a5195", "#2f9e9e")
FULL, OTHER = "#7f7f7f", "#8f7fc9"
STYLES = {"bf16": ":", "fp8": "-."}


def draw(rows: Sequence[Row], published: Sequence[Row], path: Path, *, title: str) -> None:
    """Draws one line of panels per decoder: tokens of one sequence over the context, and all other loads.

    Args:
        rows: Rows of whole models.
        published: vLLM's lines, as in the command's JSON.
        path: The file; its suffix sets the format.
        title: Heading.
    """
    timed = [row for row in rows if row["op"] == "model" and "us" in row]
    names = list(dict.fromkeys(cache_name(row) for row in timed))
    packed = [name for name in names if name != "bf16"]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(packed)} | {"bf16": FULL}
    panels: list[tuple[str, bool, list[Row]]] = []
    for shape in dict.fromkeys(row["shape"] for row in timed):
        mine = [row for row in timed if row["shape"] == shape]
        one = [row for row in mine if row["batch"] == 1]
        curve = len({row["seq"] for row in one}) > 1
        panels += [(shape, True, one)] if curve else []
        bars = [row for row in mine if not curve or row["batch"] > 1]
        panels += [(shape, False, bars)] if bars else []
    figure = Figure(figsize=(max(6.4, 6.0 * len(panels)), 4.8), layout="constrained")
    for index, (shape, curve, chosen) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        if curve:
            _curve(axes, chosen, colors, published if shape == VLLM_SHAPE else ())
        else:
            _bars(axes, chosen, colors)
        axes.set_title(f"{shape}, one sequence" if curve else shape, fontsize=10)
        top = 1.35 * max(row["us"] for row in chosen) / 1e3  # room for the legend
        axes.set(ylabel="milliseconds per token", ylim=(0, None if curve else top))
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _curve(axes: Any, rows: Sequence[Row], colors: dict[str, str], published: Sequence[Row]) -> None:
    """Time against context: measured marks, lines of least squares through them, floors dashed, and vLLM's lines."""
    contexts = sorted({row["seq"] for row in rows})
    places = _between(contexts)
    for name in dict.fromkeys(cache_name(row) for row in rows):
        mine = [row for row in rows if cache_name(row) == name]
        times, floors = ([(row["seq"], row[figure] / 1e3) for row in mine] for figure in ("us", "floor_us"))
        axes.plot(*zip(*times, strict=True), "o", color=colors[name], ms=5)
        for points, style, label in ((times, "-", name), (floors, "--", None)):
            if line := least_squares(points):
                axes.plot(places, [line.at(seq) for seq in places], style, color=colors[name], lw=1.3, label=label)
    axes.plot([], [], "--", color="black", lw=1.3, label="floor of the same color")
    for row in published:
        line = Line(row["intercept_ms"], row["slope_ms"])
        where = f"scaled to {row['scaled_to']}" if row["scaled_to"] else "H100"
        heights, color = [line.at(seq) for seq in places], "#3a7d44" if row["scaled_to"] else OTHER
        label = f"vLLM {row['cache']}, {where}"
        axes.plot(places, heights, STYLES[row["cache"]], color=color, lw=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{seq:,}" for seq in contexts], rotation=30, fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="tokens of context")
    axes.legend(fontsize=8)


def _between(contexts: Sequence[int], parts: int = 32) -> list[float]:
    """Contexts from the least to the most in equal ratios, for straight lines are curves on this axis.

    Example:
        >>> _between([1, 2, 16], parts=2)
        [1.0, 4.0, 16.0]
    """
    low, high = float(contexts[0]), float(contexts[-1])
    return [low * (high / low) ** (i / parts) for i in range(parts + 1)]


def _bars(axes: Any, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Time of several loads: a bar per cache, and its floor as a black line across it."""
    loads = list(dict.fromkeys((row["batch"], row["seq"]) for row in rows))
    names = list(dict.fromkeys(cache_name(row) for row in rows))
    width = 0.8 / len(names)
    for row in rows:
        place = loads.index((row["batch"], row["seq"])) + (names.index(cache_name(row)) - (len(names) - 1) / 2) * width
        height, floor = row["us"] / 1e3, row["floor_us"] / 1e3
        axes.bar(place, height, 0.9 * width, color=colors[cache_name(row)])
        axes.hlines(floor, place - 0.45 * width, place + 0.45 * width, color="black", lw=1.5)
        axes.annotate(f"{height:.3g}", (place, height), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(loads)), [f"{batch} x {seq:,}" for batch, seq in loads], fontsize=8)
    marks = [Line2D([], [], color=colors[name], lw=6) for name in names] + [Line2D([], [], color="black", lw=1.5)]
    axes.legend(marks, [*names, "floor"], fontsize=8)
    axes.set(xlabel="sequences x tokens of context")
