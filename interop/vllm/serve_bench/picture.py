"""The picture of `tq-jax serve-bench`: time per step against the context, and tokens that the cache holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLORS = ("#1b6ca8", "#c8553d", "#e0a458", "#5b8c5a", "#7a5195", "#2f9e9e", "#7f7f7f", "#8f7fc9", "#3a7d44", "#b5651d")


def draw(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws a panel per batch with a line per cache, and a panel of capacities.

    Args:
        rows: Rows as in the command's JSON; rows with an error, and those of as many requests as fit, are left out.
        path: The file; its suffix sets the format.
        title: Heading.
    """
    timed = [row for row in rows if "decode_ms" in row and "fit" not in row]
    held = {label(row): row["kv_tokens"] for row in rows if row.get("kv_tokens")}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(held)}
    batches = sorted({row["batch"] for row in timed})
    figure = Figure(figsize=(4.6 * (len(batches) + 1), 4.4), layout="constrained")
    for index, batch in enumerate(batches):
        axes = figure.add_subplot(1, len(batches) + 1, index + 1)
        for name, color in colors.items():
            points = sorted((r["context"], r["decode_ms"]) for r in timed if label(r) == name and r["batch"] == batch)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=name, ms=4, lw=1.4)
        contexts = sorted({row["context"] for row in timed if row["batch"] == batch})
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=8)
        axes.minorticks_off()
        axes.set(xlabel="tokens of context", ylabel="milliseconds per step", ylim=(0, None))
        axes.set_title(f"{batch} sequence{'s' if batch > 1 else ''}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    axes = figure.add_subplot(1, len(batches) + 1, len(batches) + 1)
    names = list(held)[::-1]
    axes.barh(names, [held[name] for name in names], color=[colors[name] for name in names])
    for place, name in enumerate(names):
        axes.annotate(f" {held[name]:,}", (held[name], place), va="center", fontsize=8)
    axes.set_xlim(0, 1.25 * max(held.values(), default=1))
    axes.tick_params(labelsize=8)
    axes.set_title("tokens that the cache holds", fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def label(row: dict[str, Any]) -> str:
    """Name of a row's cache."""
    return f"{row['backend']} {row['kv']}" + (f", window {row['window']}" if row["window"] else "")
