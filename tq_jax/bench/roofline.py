"""The picture of `tq-jax bench`: time against bytes, with the floor that memory sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tq_jax.bench.claims import OURS
from tq_jax.bench.job import Row

COLORS = {
    "cudnn_bf16": "#444444",
    "jax_cudnn_bf16": "#777777",
    "flash_bf16": "#aaaaaa",
    "flashinfer_bf16": "#e0a458",
    "flashinfer_fp8": "#c8553d",
}
OWN = "#1b6ca8"
MARKERS = "osD^vP*X"


def draw(rows: Sequence[Row], path: Path, *, copy_gbps: float, title: str) -> None:
    """Draws rows into an image file, one panel an operation.

    Args:
        rows: Rows of any operations.
        path: Where to; the suffix says which format.
        copy_gbps: Speed of the copy that sets the floor.
        title: Heading.
    """
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure = Figure(figsize=(max(7.5, 6.0 * len(ops)), 5.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for index, op in enumerate(ops):
        axes = figure.add_subplot(1, len(ops), index + 1)
        chosen = [row for row in rows if row["op"] == op]
        if op == "model":
            _curve(axes, chosen)
        else:
            _panel(axes, chosen, copy_gbps)
        axes.set_title(op, fontsize=10)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: Sequence[Row], copy_gbps: float) -> None:
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    for shape in shapes:
        marker = MARKERS[shapes.index(shape) % len(MARKERS)]
        for row in (row for row in rows if _shape(row) == shape):
            color = COLORS.get(row["impl"], OWN)
            face = color if row["impl"] in (*OURS, "reference") else "none"
            axes.plot(row["bytes"] / 1e6, row["us"], marker, color=color, markerfacecolor=face, markersize=6)
        axes.plot([], [], marker, color="black", markerfacecolor="none", label=shape)
    for impl in dict.fromkeys(row["impl"] for row in rows):
        axes.plot([], [], "s", color=COLORS.get(impl, OWN), label=f"tq-jax ({impl})" if impl not in COLORS else impl)
    ends = [min(row["bytes"] for row in rows) / 1.5, max(row["bytes"] for row in rows) * 1.5]
    axes.plot([x / 1e6 for x in ends], [x / copy_gbps / 1e3 for x in ends], color="black", linewidth=1)
    axes.plot([], [], color="black", linewidth=1, label=f"floor: copy at {copy_gbps:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="megabytes that have to be read", ylabel="microseconds")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="upper left")


def _curve(axes: Any, rows: Sequence[Row]) -> None:
    """Milliseconds of a decoded token against tokens in the cache, one line a cache and capacity."""
    lines = dict.fromkeys((row["capacity"], row["key"]) for row in rows)
    capacities = sorted({capacity for capacity, _ in lines})
    for capacity, stored in lines:
        points = [(row["seq"], row["us"] / 1e3) for row in rows if (row["capacity"], row["key"]) == (capacity, stored)]
        style = ("-", "--", ":")[capacities.index(capacity) % 3]
        color = COLORS["jax_cudnn_bf16"] if stored == "bf16" else OWN
        label = f"{stored}, room for {capacity}"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=color, label=label)
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds per decoded token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _shape(row: Row) -> str:
    """The shape of a row in a few characters."""
    parts = [f"{row['batch']} x {row['seq']}"] if "seq" in row else [f"{row.get('batch', '')} vectors"]
    parts += [f"dim {row['head_dim']}"] if row.get("head_dim", 128) != 128 else []
    return ", ".join(parts + ([f"{row['q_len']} queries"] if row.get("q_len", 1) > 1 else []))
