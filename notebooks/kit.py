"""Code that the notebooks share: the style of figures, tables, and recorded results."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Markdown

OURS, PUBLISHED, FULL, GREEN, ORANGE, PURPLE = "#1b6ca8", "#c8553d", "#777777", "#3a7d44", "#e0a458", "#7a4fa3"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

plt.rcParams.update(
    {
        "figure.figsize": (7, 3.8),
        "figure.dpi": 144,
        "figure.constrained_layout.use": True,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "axes.prop_cycle": plt.cycler(color=[OURS, PUBLISHED, GREEN, ORANGE, PURPLE, FULL]),
        "legend.fontsize": 9,
    }
)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A Markdown table. Numbers are right-aligned; floats get four significant digits."""
    lines = [[_text(cell) for cell in row] for row in rows]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    rule = ["---:" if number else ":---" for number in numeric]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in [list(header), rule, *lines]))


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def recorded(name: str) -> dict[str, Any]:
    """The figures of a file in `benchmarks/results`, which a command measured and wrote with --json."""
    return json.loads((RESULTS / name).read_text("utf-8"))


def recorded_like(pattern: str) -> list[dict[str, Any]]:
    """The figures of all files whose names match a pattern, in the order of the names."""
    return [recorded(path.name) for path in sorted(RESULTS.glob(pattern))]
