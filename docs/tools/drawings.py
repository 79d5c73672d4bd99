"""Draws the pictures of docs/how_it_works.md: `python docs/tools/drawings.py`, with the extra `models`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import tq_jax as tq
from tq_jax.codebook import codebook
from tq_jax.quantizer import to_rotated

FOLDER = Path(__file__).parents[1]
BLUE, ORANGE, GREY = "#2b6cb0", "#d9730d", "#6f6f6f"
LIGHT_BLUE, LIGHT_ORANGE = "#e6eef9", "#fdeedc"
"""The colours of docs/decode_step.png: the original basis and the rotated one."""

DIM, TOKENS, TOKEN, BITS = 64, 256, 3, 3


def made_up_keys() -> jax.Array:
    """Keys [tokens, channels] as models have them: a mean that all share, and some channels that are much wider."""
    noise, mean = jax.random.normal(jax.random.key(0), (TOKENS, DIM)), jax.random.normal(jax.random.key(1), (DIM,))
    width = jnp.ones(DIM).at[jnp.array([9, 30, 51])].set(jnp.array([5.0, 3.0, 4.0]))
    return noise * width + 2.0 * mean * width


def draw_key_to_bytes(path: Path) -> None:
    """Draws one key in each step from its channels to its codes."""
    keys = made_up_keys()
    spec = tq.CacheSpec.recommended(1, DIM, TOKENS, BITS, BITS, window=0, sink_tokens=0)
    cache = tq.append(tq.init_cache(spec, batch=1), keys[None, :, None], keys[None, :, None])
    quantizer, statistics = cache.key_quantizer, cache.statistics
    centred = keys[TOKEN] - statistics.mean[0, 0]
    weighted = centred * statistics.weight[0, 0]
    rotated = to_rotated(quantizer, weighted)
    unit = np.asarray(rotated / jnp.linalg.norm(rotated))
    book = codebook(DIM, BITS)
    nearest = np.abs(unit[:, None] - book.centroids[None]).argmin(axis=1)
    panels = [
        ("a key", np.asarray(keys[TOKEN]), BLUE),
        ("minus the mean of all keys", np.asarray(centred), BLUE),
        ("times a weight per channel", np.asarray(weighted), BLUE),
        ("rotated", np.asarray(rotated), ORANGE),
    ]
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.4), layout="constrained")
    for number, (axis, (title, values, color)) in enumerate(zip(axes[:4], panels, strict=True), 1):
        axis.bar(range(DIM), values, color=color, width=1.0)
        _finish(axis, f"{number}  {title}", "value")
    axis = axes[4]
    for centroid in book.centroids:
        axis.axhline(centroid, color=GREY, lw=0.6)
    axis.bar(range(DIM), unit, color="#f5cfa3", width=1.0)
    axis.plot(range(DIM), np.asarray(book.centroids)[nearest], ".", color=ORANGE, ms=4)
    _finish(axis, f"5  rounded to {2**BITS} centroids", "value / norm")
    figure.savefig(path, dpi=144)


def _finish(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("channel")
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)


def draw_cache_layout(path: Path) -> None:
    """Draws which tokens of a sequence are in sink slots, pages and ring."""
    figure, axis = plt.subplots(figsize=(15, 2.4), layout="constrained")
    sinks, page, pages, ring = 4, 12, 4, 14
    used = sinks + page * (pages - 1) + 7
    for token in range(used + ring):
        in_pages = sinks <= token < used
        axis.add_patch(
            Rectangle(
                (token, 2), 0.86, 0.8, fc=LIGHT_ORANGE if in_pages else LIGHT_BLUE, ec=ORANGE if in_pages else BLUE
            )
        )
    axis.text(0, 3.35, "tokens of a sequence in order of position", color=GREY)
    _room(axis, 0, sinks, "sink slots", "full precision", BLUE)
    for number in range(pages):
        start = sinks + page * number
        _room(axis, start, min(page, used - start), f"page {number}", "codes and scales", ORANGE)
    _room(axis, used, ring, "window, in the ring", "full precision", BLUE)
    arrow = {"arrowstyle": "-|>", "color": GREY, "lw": 1.5}
    axis.annotate("", (used - 1.2, 3.05), (used + 0.8, 3.05), arrowprops=arrow)
    text = "a new token pushes the oldest one out of the window: it is encoded, once"
    axis.text(used - 0.2, 3.35, text, color=GREY, ha="center")
    axis.set(xlim=(-0.5, used + ring + 0.5), ylim=(0.2, 3.8))
    axis.axis("off")
    figure.savefig(path, dpi=144)


def _room(axis: Axes, start: int, tokens: int, name: str, form: str, color: str) -> None:
    """A bracket under tokens, with what holds them and how."""
    axis.plot([start, start, start + tokens - 0.14, start + tokens - 0.14], [1.8, 1.6, 1.6, 1.8], color=color)
    axis.text(start + tokens / 2, 1.3, name, ha="center", va="top", weight="bold", color=color)
    axis.text(start + tokens / 2, 0.75, form, ha="center", va="top", color=color, fontsize=9)


if __name__ == "__main__":
    draw_key_to_bytes(FOLDER / "key_to_bytes.png")
    draw_cache_layout(FOLDER / "cache_layout.png")
