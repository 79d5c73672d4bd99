"""Tables of `tq-jax eval --task`."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def make_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Rows of one task for a reader, in the order in which they were measured.

    Args:
        rows: Rows as in the command's JSON.
        title: Name of the task.
    """
    table = Table(title=title, title_justify="left")
    for name in ("window", "cache", "bits", "score", "95 %", "tokens", "cut off", "KL per step", "KL, last steps"):
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), style="bold" if row["scheme"] == "tq" else "")
    return table


def one_line(row: dict[str, Any]) -> str:
    """One row in one line, printed as soon as it is measured."""
    names = ("window", "", "bits", "score", "95 %", "tokens", "cut off", "KL", "last")
    cells = (f"{name} {cell}".strip() for name, cell in zip(names, _cells(row), strict=True))
    return f"{row['task']}: " + ", ".join(cells)


def _cells(row: dict[str, Any]) -> list[str]:
    stretches = row["kl_by_step"]
    return [
        "-" if row["window"] is None else str(row["window"]),
        row["label"],
        f"{row['stored_bits_per_element']:.2f}",
        f"{row['score']:.1%}",
        f"{row['low']:.0%} to {row['high']:.0%}",
        f"{row['tokens']:.0f}",
        f"{row['unfinished']:.0%}",
        f"{row['kl_mean']:.5f}",
        f"{stretches[-1]['kl']:.5f}" if stretches else "-",
    ]
