"""Pictures of `tq-jax eval --task`: scores of each cache, and divergence by step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

OURS, FULL, OTHER = "#1b6ca8", "#222222", "#9aa5b1"
"""Colours of this package's caches, of full precision, and of rivals."""


def draw(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws rows of `tq-jax eval --task` (their JSON form) into an image file, two panels per task.

    Args:
        rows: Rows as in the command's JSON.
        path: The file; its suffix sets the format.
        title: Heading.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    most = max(sum(row["task"] == task for row in rows) for task in tasks)
    figure = Figure(figsize=(12.5, max(3.6, 0.24 * most + 1.2) * len(tasks) + 0.5), layout="constrained")
    figure.suptitle(title)
    for (scores, steps), task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        same = [row for row in rows if row["task"] == task]
        _draw_scores(scores, same, task)
        _draw_steps(steps, same)
    figure.savefig(path, dpi=130)


def _draw_scores(axes: Any, rows: Sequence[dict[str, Any]], task: str) -> None:
    axes.axvline(100 * rows[0]["score"], color=FULL, linewidth=1, linestyle=":", zorder=0)
    for line, row in enumerate(rows):
        score, low, high = (100 * row[name] for name in ("score", "low", "high"))
        axes.errorbar(score, line, xerr=[[score - low], [high - score]], fmt="o", color=_colour(row), capsize=2)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    axes.set(title=task, xlabel=f"score of {rows[0]['items']} questions, %, with 95 % intervals")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _draw_steps(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        stretches = [stretch for stretch in row["kl_by_step"] if stretch["kl"] > 0]
        if stretches:
            places = [(stretch["first"] + stretch["last"]) / 2 for stretch in stretches]
            style = "--" if row["window"] == 0 else "-"
            line = axes.plot(places, [s["kl"] for s in stretches], style, marker=".", color=_colour(row), alpha=0.8)[0]
            axes.annotate(
                _name(row), (places[-1], stretches[-1]["kl"]), xytext=(4, 0), textcoords="offset points",
                fontsize=7, va="center", color=line.get_color(), annotation_clip=False,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", title="does the error add up?", xlabel="token of the answer")
    axes.set_ylabel("KL to full precision, nats per token")
    axes.margins(x=0.3)
    axes.grid(alpha=0.3)


def _colour(row: dict[str, Any]) -> str:
    return {"tq": OURS, "full": FULL}.get(row["scheme"], OTHER)


def _name(row: dict[str, Any]) -> str:
    return row["label"] if row["window"] is None else f"{row['label']}, window {row['window']}"
