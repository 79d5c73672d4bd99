"""Intervals of scores, and the claims of `tq-jax eval --task`."""

import math
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest

from tq_jax.commands.claims import Claim

NORMAL = 1.959964
"""Quantile of the normal distribution for an interval of 95 %."""

CHANCE = 0.01
"""Probability below which lost questions are no chance."""

HOLDING = {"K4/V4": 0, "K3/V3": 1}
"""Caches that must answer as well as full precision, and the least window with which they must."""


def interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a mean score of questions; wider than needed for scores between 0 and 1.

    Args:
        mean: The mean score, 0 to 1.
        count: Number of questions.

    Example:
        >>> low, high = interval(0.5, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    weight = NORMAL**2 / count
    center = (mean + weight / 2) / (1 + weight)
    reach = NORMAL / (1 + weight) * math.sqrt(mean * (1 - mean) / count + weight / (4 * count))
    return max(center - reach, 0.0), min(center + reach, 1.0)


def chance_of(ours: dict[str, float], full: dict[str, float]) -> tuple[float, int, int]:
    """Sign test: how probable so many lost questions are if gains and losses are equally probable.

    Args:
        ours: Score of each question.
        full: Scores of the same questions in full precision.

    Returns:
        The probability, and the numbers of questions lost and gained.

    Example:
        >>> chance_of({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
        (0.5, 1, 0)
    """
    lost, gained = (sum(sign * ours[name] > sign * full[name] for name in full) for sign in (-1, 1))
    if lost + gained == 0:
        return 1.0, 0, 0
    return float(binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue), lost, gained


def judge(rows: Sequence[dict[str, Any]], exact: str) -> list[Claim]:
    """Whether this package's caches answer as well as full precision, within chance.

    Args:
        rows: Rows as in the command's JSON.
        exact: Label of the rows in full precision.
    """
    claims = []
    for row in rows:
        least = HOLDING.get(row["label"])
        if least is None or row["window"] < least:
            continue
        full = next(r for r in rows if (r["task"], r["label"]) == (row["task"], exact))
        chance, lost, gained = chance_of(row["scores"], full["scores"])
        name = f"{row['task']}, window {row['window']}, {row['label']}: probability of so many lost questions by chance"
        note = f"{row['score']:.1%} beside {full['score']:.1%}: {lost} lost, {gained} gained of {row['items']}"
        claims.append(Claim(name, chance, ">=", CHANCE, note=note))
    return claims
