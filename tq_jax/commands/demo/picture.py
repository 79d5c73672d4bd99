"""The picture of `tq-jax demo`: quality per stored bit and memory."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLORS = {"tq": "#1b6ca8", "turboquant": "#c8553d", "full": "#777777"}
NAMES = {"tq": "tq-jax", "turboquant": "TurboQuant as published"}


def draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws rows of `tq-jax demo` (their JSON form) into an image file.

    Args:
        rows: Rows as in the command's JSON.
        path: The file; its suffix sets the format.
        title: Heading.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    _draw_quality(figure.add_subplot(1, 2, 1), rows)
    _draw_memory(figure.add_subplot(1, 2, 2), [row for row in rows if row["scheme"] != "turboquant"])
    figure.savefig(path, dpi=130)


def _draw_quality(axes: Any, rows: list[dict[str, Any]]) -> None:
    for scheme, name in NAMES.items():
        chosen = sorted((r for r in rows if r["scheme"] == scheme), key=lambda r: r["stored_bits_per_element"])
        if not chosen:
            continue
        bits = [row["stored_bits_per_element"] for row in chosen]
        axes.plot(bits, [row["kl_mean"] for row in chosen], "o-", color=COLORS[scheme], label=name)
        if scheme == "tq":
            for row in chosen:
                place = (row["stored_bits_per_element"], row["kl_mean"])
                axes.annotate(row["label"], place, xytext=(-6, -11), textcoords="offset points", ha="right", fontsize=8)
    full = [row["kl_mean"] for row in rows if row["scheme"] == "full"]
    if full:
        axes.axhline(full[0], color=COLORS["full"], linestyle=":", label="bfloat16 cache")
    axes.set(
        yscale="log",
        xlabel="stored bits per number, scales included (K4/V4: keys and values of 4 bits)",
        ylabel="KL from full precision, nats (lower is better)",
    )
    axes.margins(x=0.12)
    axes.set_title("What it costs: divergence of the next token", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_memory(axes: Any, rows: list[dict[str, Any]]) -> None:
    labels, sizes = [row["label"] for row in rows], [row["bytes"] / 1e6 for row in rows]
    bars = axes.barh(labels, sizes, color=[COLORS[row["scheme"]] for row in rows])
    notes = [f" {size:.1f} MB  ({row['ratio_total']:.2f}x)" for size, row in zip(sizes, rows, strict=True)]
    axes.bar_label(bars, notes, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="megabytes of the whole cache, all counted", xlim=(0, max(sizes) * 1.3))
    axes.set_title("What it saves: memory", fontsize=10)
