"""The picture of `tq-jax needle`: one heat map per cache, length of the prompt against depth of the number."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

WORST = -7.0
"""Log-probability at the dark end of the colours: one in a thousand."""


def draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws rows of `tq-jax needle` (their JSON form) into an image file.

    Args:
        rows: Rows as in the command's JSON.
        path: The file; its suffix sets the format.
        title: Heading.
    """
    labels, lengths, depths = (list(dict.fromkeys(row[name] for row in rows)) for name in ("label", "length", "depth"))
    columns = min(4, len(labels))
    lines = -(-len(labels) // columns)
    figure = Figure(figsize=(3.0 * columns + 1, 2.6 * lines + 0.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes, label in zip(panels.flat, labels, strict=False):
        same = [row for row in rows if row["label"] == label]
        image = _draw_panel(axes, same, lengths, depths)
        axes.set_title(f"{label}, {same[0]['stored_bits_per_element']:.2f} bits", fontsize=9)
    for axes in list(panels.flat)[len(labels) :]:
        axes.axis("off")
    for axes in panels[:, 0]:
        axes.set_ylabel("depth")
    for axes in panels[-1]:
        axes.set_xlabel("tokens of the prompt")
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.8, label="log-probability of the number, mean (nats)")
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Any, rows: list[dict[str, Any]], lengths: list[int], depths: list[float]) -> Any:
    """Draws one cache: colours for the log-probability, and how many numbers were found."""
    cells = [[[r for r in rows if (r["length"], r["depth"]) == (n, d)] for n in lengths] for d in depths]
    mean = np.array([[np.mean([r["log_prob"] for r in cell]) for cell in line] for line in cells])
    image = axes.imshow(mean, cmap="viridis", vmin=WORST, vmax=0.0, aspect="auto")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            note = f"{sum(r['exact'] for r in cell)}/{len(cell)}"
            axes.text(x, y, note, ha="center", va="center", fontsize=8, color="black" if mean[y, x] > -2 else "white")
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    return image
