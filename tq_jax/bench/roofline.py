"""The picture of `tq-jax bench`: time against bytes, with the floor that memory sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tq_jax.bench.job import Row

COLORS = {
    "cudnn_bf16": "#444444",
    "jax_cudnn_bf16": "#777777",
    "flash_bf16": "#aaaaaa",
    "float16": "#444444",
    "flashinfer_bf16": "#e0a458",
    "flashinfer_fp8": "#c8553d",
}
OWN = "#1b6ca8"
COLUMNS = 4


def draw(rows: Sequence[Row], path: Path, *, copy_gbps: float, title: str) -> None:
    """Draws rows into an image file, one panel a shape of an operation.

    Args:
        rows: Rows of any operations.
        path: Where to; the suffix says which format.
        copy_gbps: Speed of the copy that sets the floor.
        title: Heading.
    """
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row["op"] if row["op"] == "model" else f"{row['op']}, {_shape(row)}", []).append(row)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 3.5 * lines + 0.6), layout="constrained")
    seen: dict[str, Any] = {}
    for index, (name, chosen) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        if chosen[0]["op"] == "model":
            _curve(axes, chosen)
        else:
            _panel(axes, chosen, copy_gbps, seen)
    floor = f"; line: a copy at {copy_gbps:.0f} GB/s" if seen else ""
    figure.suptitle(title + floor, fontsize=11)
    if seen:
        figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=len(seen), fontsize=8)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: Sequence[Row], copy_gbps: float, seen: dict[str, Any]) -> None:
    """Microseconds against megabytes of one shape, the project's rows with their codes; `seen` is for the legend."""
    for row in rows:
        color = COLORS.get(row["impl"], OWN)
        place = row["bytes"] / 1e6, row["us"]
        own = row["impl"] not in COLORS
        [mark] = axes.plot(*place, "o" if own else "s", color=color, markerfacecolor=color if own else "none", ms=6)
        seen.setdefault(f"tq-jax ({row['impl']})" if own else row["impl"], mark)
        if own and row.get("paged", True):
            axes.annotate(_codes(row), place, xytext=(1, 5), textcoords="offset points", rotation=50, fontsize=7)
    wide, high = max(row["bytes"] for row in rows) * 1.15e-6, max(row["us"] for row in rows) * 1.2
    axes.plot([0, wide], [0, wide * 1e3 / copy_gbps], color="black", linewidth=1)
    axes.set(xlim=(0, wide), ylim=(0, high), xlabel="megabytes to read", ylabel="microseconds")


def _codes(row: Row) -> str:
    """What a row stores, K4/V4 for two codes of mse.

    Example:
        >>> _codes({"key": "mse4", "value": "mse2"}), _codes({"key": "prod3", "value": "group2"})
        ('K4/V2', 'prod3/group2')
    """
    key, value = row["key"], row["value"]
    both = key.startswith("mse") and value.startswith("mse")
    return f"K{key[3:]}/V{value[3:]}" if both else "/".join(filter(None, (key, value)))


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
    axes.legend(fontsize=8)


def _shape(row: Row) -> str:
    """The shape of a row in a few characters."""
    parts = [f"{row['batch']} x {row['seq']}" if "seq" in row else f"{row['batch']}"]
    parts += [f"dim {row['head_dim']}"] if row.get("head_dim", 128) != 128 else []
    return ", ".join(parts + ([f"{row['q_len']} queries"] if row.get("q_len", 1) > 1 else []))
