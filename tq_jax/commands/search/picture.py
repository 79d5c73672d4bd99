"""The picture of `tq-jax search`: recall against bytes, one panel per data set."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MARKS = {
    "tq": ("o", "#1b6ca8"),
    "tq, random basis": ("s", "#4fa3d9"),
    "TurboQuant mse, as published": ("v", "#c8553d"),
    "TurboQuant prod, as published": ("^", "#e0a090"),
    "faiss PQ": ("D", "#3a7d44"),
    "faiss RaBitQ": ("P", "#7a4fa3"),
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws rows of `tq-jax search` (their JSON form) into an image file.

    Args:
        rows: Rows as in the command's JSON.
        path: The file; its suffix sets the format.
    """
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(4.2 * len(names), 4), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        for method, (marker, color) in MARKS.items():
            same = ("tq", "tq, bytes of RaBitQ") if method == "tq" else (method,)
            chosen = sorted((r for r in rows if r["data"] == name and r["method"] in same), key=lambda r: r["bytes"])
            points = [row["bytes"] for row in chosen], [row["recall"]["1"] for row in chosen]
            axes.plot(*points, marker=marker, color=color, label=method)
        axes.set(title=name, xlabel="bytes per vector, scales included", ylabel="recall 1@1", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=130)
