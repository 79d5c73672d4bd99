"""Tables of `tq-jax eval`."""

from typing import Any

from rich.table import Table


def make_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows of one text for a reader, sorted by window and stored bits.

    Args:
        rows: Rows as in the command's JSON.
        title: Name of the text.
    """
    table = Table(title=title, title_justify="left")
    columns = ("window", "cache", "bits", "KL", "KL 99.9 %", "top-1", "equal", "perplexity", "logits r", "error")
    for name in columns:
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda r: (-r["window"], -r["stored_bits_per_element"], r["kl_mean"])):
        table.add_row(*_cells(row), style="bold" if row["scheme"] == "tq" else "")
    return table


def one_line(row: dict[str, Any]) -> str:
    """One row in one line, printed as soon as it is measured."""
    names = ("window", "", "bits", "KL", "99.9 %", "top-1", "equal", "perplexity", "logits r", "error")
    cells = (f"{name} {cell}".strip() for name, cell in zip(names, _cells(row), strict=True))
    return f"{row['text']}: " + ", ".join(cells)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["window"]),
        row["label"],
        f"{row['stored_bits_per_element']:.2f}",
        f"{row['kl_mean']:.5f}",
        f"{row['kl_p999']:.4f}",
        f"{row['top1']:.1%}",
        str(row["same"]),
        f"{row['ppl'] / row['ppl_fp'] - 1:+.2%}",
        f"{row['logit_correlation_worst']:.4f}",
        f"{row['attention_error']:.4f}",
    ]
