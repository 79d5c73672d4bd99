"""The picture of `tq-jax bench`: time against bytes, with the floor that memory sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tq_jax.commands.bench.job import Row

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
NAME_HEIGHT = 0.055
"""Height of a code's name, as a share of a panel."""


def draw(rows: Sequence[Row], path: Path, *, copy_gbps: float, title: str) -> None:
    """Draws rows into an image file, one panel per shape of an operation that more than one row has.

    Args:
        rows: Rows of any operations but whole models.
        path: The file; its suffix sets the format.
        copy_gbps: Speed of the copy that sets the floor, GB/s.
        title: Heading.
    """
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row['op']}, {_shape(row)}", []).append(row)
    panels = {name: chosen for name, chosen in panels.items() if len(chosen) > 1} or panels
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 3.5 * lines + 0.6), layout="constrained")
    seen: dict[str, Any] = {}
    for index, (name, chosen) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        _panel(axes, chosen, copy_gbps, seen)
    figure.suptitle(f"{title}; line: a copy at {copy_gbps:.0f} GB/s", fontsize=11)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=len(seen), fontsize=8)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: Sequence[Row], copy_gbps: float, seen: dict[str, Any]) -> None:
    """Draws microseconds against megabytes of one shape, with names of codes; adds marks of the legend to `seen`."""
    for row in rows:
        color = COLORS.get(row["impl"], OWN)
        place = row["bytes"] / 1e6, row["us"]
        own = row["impl"] not in COLORS
        [mark] = axes.plot(*place, "o" if own else "s", color=color, markerfacecolor=color if own else "none", ms=6)
        seen.setdefault(f"tq-jax ({row['impl']})" if own else row["impl"], mark)
    wide, high = max(row["bytes"] for row in rows) * 1.15e-6, max(row["us"] for row in rows) * 1.2
    axes.plot([0, wide], [0, wide * 1e3 / copy_gbps], color="black", linewidth=1)
    axes.set(xlim=(0, wide), ylim=(0, high), xlabel="megabytes to move", ylabel="microseconds")
    _name_codes(axes, [row for row in rows if row["impl"] not in COLORS and row.get("paged", True)], wide, high)


def _name_codes(axes: Any, rows: Sequence[Row], wide: float, high: float) -> None:
    """Writes the names of rows in one column beside all of them, to the right if there is room."""
    if not rows:
        return
    rows, places = sorted(rows, key=lambda row: row["us"]), [row["bytes"] / 1e6 for row in rows]
    right = max(places) < wide / 2
    column = (max(places) + 0.05 * wide) if right else (min(places) - 0.05 * wide)
    for row, height in zip(rows, spread([row["us"] / high for row in rows]), strict=True):
        axes.annotate(
            _codes(row),
            (row["bytes"] / 1e6, row["us"]),
            xytext=(column, height * high),
            ha="left" if right else "right",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            arrowprops={"arrowstyle": "-", "color": OWN, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )


def spread(heights: Sequence[float], gap: float = NAME_HEIGHT, top: float = 1 - NAME_HEIGHT) -> list[float]:
    """Moves ascending heights up where they are closer than a gap, and down again where they exceed the top.

    Example:
        >>> spread([1, 2, 7], gap=2, top=9), spread([1, 7, 8], gap=2, top=9)
        ([1, 3, 7], [1, 7, 9])
        >>> spread([7, 8, 8], gap=2, top=9)
        [5, 7, 9]
    """
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    for i, height in reversed(list(enumerate(moved))):
        moved[i] = min(height, top - gap * (len(moved) - 1 - i))
    return moved


def _codes(row: Row) -> str:
    """Name of a row's codes: K4/V4 if both are mse, and whether the step was searched.

    Example:
        >>> _codes({"key": "mse4", "value": "mse2"}), _codes({"key": "prod3", "value": "group2", "search": True})
        ('K4/V2', 'prod3/group2, search')
    """
    key, value = row["key"], row["value"]
    both = key.startswith("mse") and value.startswith("mse")
    name = f"K{key[3:]}/V{value[3:]}" if both else "/".join(filter(None, (key, value)))
    return f"{name}, search" if row.get("search") else name


def _shape(row: Row) -> str:
    """The shape of a row in a few characters."""
    parts = [f"{row['batch']} x {row['seq']}" if "seq" in row else f"{row['batch']}"]
    parts += [f"dim {row['head_dim']}"] if row.get("head_dim", 128) != 128 else []
    return ", ".join(parts + ([f"{row['q_len']} queries"] if row.get("q_len", 1) > 1 else []))
