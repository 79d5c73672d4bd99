"""Pictures of `tq-jax eval`: divergence against stored bits, and what each part of this package's caches is worth."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

MARKS = {
    "tq": ("o", "#1b6ca8", "tq-jax"),
    "turboquant": ("v", "#c8553d", "TurboQuant mse, as published"),
    "turboquant_prod": ("^", "#e0a090", "TurboQuant prod, as published"),
    "kivi": ("s", "#3a7d44", "KIVI, groups of 32 and 128"),
    "vllm": ("D", "#7a4fa3", "vLLM presets"),
    "int4": ("P", "#b8860b", "int4, Hadamard"),
    "fp8": ("X", "#555555", "fp8 e4m3"),
    "block_gtq": ("h", "#2a9d8f", "Block-GTQ, calibrated on the text"),
    "oscar": ("*", "#d4a017", "OSCAR, calibrated on the text"),
}
"""Marker, colour and name of each kind of scheme; every "vllm_..." scheme is of kind "vllm"."""


def draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws rows of `tq-jax eval` (their JSON form) into an image file, one panel per text and window.

    Args:
        rows: Rows as in the command's JSON.
        path: The file; its suffix sets the format.
        title: Heading.
    """
    texts, windows = (list(dict.fromkeys(row[name] for row in rows)) for name in ("text", "window"))
    figure = Figure(figsize=(max(4.3 * len(texts), 8.6), 4.0 * len(windows) + 0.7), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(windows), len(texts), squeeze=False, sharex=True, sharey="row")
    for i, window in enumerate(windows):
        for j, text in enumerate(texts):
            chosen = [row for row in rows if (row["text"], row["window"]) == (text, window)]
            _draw_panel(panels[i, j], chosen)
            panels[i, j].set_title(f"{text}, {_window_name(window)}", fontsize=10)
        panels[i, 0].set_ylabel("KL to full precision (nats)")
    for axes in panels[-1]:
        axes.set_xlabel("stored bits per element, all counted")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_ablation(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws rows of `tq-jax eval --ablation` into an image file: divergences, one panel per width and window.

    Args:
        rows: Rows as in the command's JSON; a point is the geometric mean over texts.
        path: The file; its suffix sets the format.
        title: Heading.
    """
    panels: dict[tuple[float, int], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        panel = panels.setdefault(((row["key_bits"] + row["value_bits"]) / 2, row["window"]), {})
        panel.setdefault(row["label"], []).append(row)
    figure = Figure(figsize=(max(6.4 * len(panels), 8.6), 6.0), layout="constrained")
    figure.suptitle(title)
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((bits, window), labels) in zip(columns, panels.items(), strict=True):
        means = [float(np.exp(np.mean(np.log([row["kl_mean"] for row in same])))) for same in labels.values()]
        own = [same[0]["scheme"] == "tq" for same in labels.values()]
        reach = (2 * max(means) / min(means)) ** 0.25  # room for numbers on both sides
        label = "KL, nats (lower is better), geometric mean over texts"
        axes.set(xscale="log", xlabel=label, xlim=(min(means) / reach, max(means) * reach))
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        for line, (mean, mine) in enumerate(zip(means, own, strict=True)):
            axes.plot(mean, line, "o", color=MARKS["tq"][1] if mine else "#7b8fa6")
            place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{mean:.2g}", (mean, line), **place, fontsize=8, bbox=paper)
            if mine:
                axes.axvline(mean, color=MARKS["tq"][1], linewidth=1, linestyle=":", zorder=0)
        axes.set_yticks(range(len(labels)), list(labels))
        axes.grid(axis="y", alpha=0.3)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{bits:g} bits, {_window_name(window)}", fontsize=10)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=130)


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that have a smaller divergence than every row with fewer bits, sorted by bits.

    Example:
        >>> rows = [{"stored_bits_per_element": b, "kl_mean": kl} for b, kl in ((4, 0.1), (3, 0.2), (5, 0.3))]
        >>> [row["stored_bits_per_element"] for row in front(rows)]
        [3, 4]
    """
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["stored_bits_per_element"], r["kl_mean"])):
        if not best or row["kl_mean"] < best[-1]["kl_mean"]:
            best.append(row)
    return best


def _draw_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    coded = [row for row in rows if row["scheme"] != "full"]
    best = front(coded)
    places = [row["stored_bits_per_element"] for row in best], [row["kl_mean"] for row in best]
    axes.plot(*places, color="#999999", linewidth=5, alpha=0.35, label="front", zorder=0)
    for kind, (marker, color, name) in MARKS.items():
        same = [row for row in coded if row["scheme"] == kind or (kind == "vllm" and row["scheme"].startswith("vllm"))]
        points = [row["stored_bits_per_element"] for row in same], [row["kl_mean"] for row in same]
        if same:
            axes.plot(
                *points, marker=marker, color=color, label=name, linestyle="", markersize=6 if kind == "tq" else 5
            )
    for row in (r for r in coded if r["scheme"] == "tq"):
        place = (row["stored_bits_per_element"], row["kl_mean"])
        axes.annotate(row["label"], place, xytext=(-5, -10), textcoords="offset points", ha="right", fontsize=7)
    axes.set_yscale("log")
    axes.margins(x=0.16)
    axes.grid(alpha=0.3)


def _window_name(window: int) -> str:
    return f"{window} latest tokens exact" if window else "all tokens compressed"
