"""The claims of `tq-jax eval`."""

from typing import Any

from tq_jax.commands.claims import Claim

OURS = "tq"
NEAR = 0.75
"""Largest difference in stored bits at which a rival's divergence is converted to equal bits."""

RATE = 4.0
"""Factor by which one bit reduces squared errors, and so divergences, in theory (arXiv 2504.19874, Theorem 1)."""


def judge(rows: list[dict[str, Any]]) -> list[Claim]:
    """Whether each cache of equal key and value bits beats every rival, on each text and in each window.

    Args:
        rows: Rows as in the command's JSON.

    Returns:
        One claim per width, text and window: the smallest divergence of a rival at equal bits over the cache's own.
    """
    claims = []
    for row in rows:
        if row["scheme"] != OURS or row["key_bits"] != row["value_bits"]:
            continue
        same = [r for r in rows if (r["text"], r["window"]) == (row["text"], row["window"])]
        at_equal_bits = {r["label"]: kl_at(r, row["stored_bits_per_element"]) for r in same if _comparable(r, row)}
        if not at_equal_bits:
            continue
        best = min(at_equal_bits, key=lambda label: at_equal_bits[label])
        ratio = at_equal_bits[best] / row["kl_mean"]
        name = f"{row['text']}, window {row['window']}, {row['label']}: divergence of the best rival over ours"
        note = f"{ratio:.2f} times, {best}"
        details = {label: kl / row["kl_mean"] for label, kl in at_equal_bits.items()}
        claims.append(Claim(name, ratio, ">=", 1.0, note=note, details=details))
    return claims


def kl_at(row: dict[str, Any], bits: float) -> float:
    """A row's divergence, converted to a number of stored bits by the rate of theory.

    Example:
        >>> kl_at({"kl_mean": 0.01, "stored_bits_per_element": 4.5}, 4.0)
        0.02
    """
    return row["kl_mean"] * RATE ** (row["stored_bits_per_element"] - bits)


def _comparable(rival: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row is a rival of about the same size, or a rival that stores more and still diverges more."""
    if rival["scheme"] in (OURS, "full"):
        return False
    more = rival["stored_bits_per_element"] - row["stored_bits_per_element"]
    return abs(more) <= NEAR or (more > 0 and rival["kl_mean"] > row["kl_mean"])
