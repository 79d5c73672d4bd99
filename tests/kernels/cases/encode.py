"""Cases for the encode kernel, and a comparison that tells ties of float32 rounding from errors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from pallas_kernels.encode import Encoder, reference
from pallas_kernels.format import Code, CodebookFormat
from pallas_kernels.packing import packed_bytes, unpack
from pallas_kernels.pages import Pages, empty_pages
from tests.kernels.cases.formats import Formats
from tq_jax.quantizer import encoder

PATTERN = 0xA5
TIE = 2e-6
"""Distance from a threshold, relative to the threshold or the largest channel, that float32 rounding can bridge."""

EQUAL_GAIN = 1e-6
"""Relative difference of gains, sums of float32, that rounding can bridge."""

HALF_TIE = 1.01 * 2.0**-10
"""Relative distance of neighbouring float16 numbers."""


@dataclasses.dataclass(frozen=True)
class Case(Formats):
    """Tokens to encode, beside their formats.

    Attributes:
        lead: Cache rows, and tokens per row.
        page_size: Tokens per page.
        dtype: Type of the vectors.
        statistics: Whether keys are centred and weighted.
        skip: Share of the tokens that have no slot.
    """

    lead: tuple[int, int] = (2, 37)
    page_size: int = 16
    dtype: str = "bfloat16"
    statistics: bool = True
    skip: float = 0.1


def _bits(key: float, value: float, key_scale: str = "unbiased", **options: Any) -> Case:
    search = options.pop("search", False)
    return Case({"bits": key, "scale": key_scale, "search": search}, {"bits": value, "search": search}, **options)


CASES = {
    "k4v4": _bits(4, 4),
    "k4v4 search": _bits(4, 4, search=True),
    "k3v5 matched search": _bits(3, 5, "matched", search=True),
    "k2v2 search": _bits(2, 2, search=True),
    "k1v8 norm": _bits(1, 8, "norm", lead=(2, 20)),
    "k8v1 search": _bits(8, 1, search=True),
    "k5v3": _bits(5, 3),
    "k2.5v3.5 d64": _bits(2.5, 3.5, dim=64),
    "k3.5v2.5 search": _bits(3.5, 2.5, search=True),
    "prod4 group2": Case({"bits": 4, "kind": "prod"}, {"bits": 2, "kind": "group"}),
    "prod3 group2": Case({"bits": 3, "kind": "prod"}, {"bits": 2, "kind": "group"}, statistics=False, lead=(1, 70)),
    "prod2 search": Case({"bits": 2, "kind": "prod", "scale": "unbiased", "search": True}, dtype="float32"),
    "prod4 search": Case({"bits": 4, "kind": "prod", "scale": "unbiased", "search": True}),
    "prod1 group4": Case({"bits": 1, "kind": "prod"}, {"bits": 4, "kind": "group", "group": 16}, dim=64),
    "prod3 haar": Case({"bits": 3, "kind": "prod", "rotation": "haar"}, {"bits": 4, "rotation": "haar"}, dim=64),
    "d64 float32": _bits(4, 3, dim=64, dtype="float32", lead=(1, 65)),
    "d80 haar": Case({"bits": 3}, {"bits": 2.5, "rotation": "haar"}, dim=80, lead=(1, 17)),
    "d96 group": Case({"bits": 4}, {"bits": 4, "kind": "group"}, dim=96),
    "d192": _bits(3, 4, dim=192, lead=(1, 33)),
    "d256": _bits(4, 2, dim=256, lead=(1, 20)),
    "prod3 d256": Case({"bits": 3, "kind": "prod"}, {"bits": 3}, dim=256, lead=(1, 18)),
    "one token": _bits(4, 4, lead=(1, 1), skip=0.0),
    "decode step": _bits(4, 3, lead=(21, 1)),
    "decode step, search": _bits(4, 4, search=True, lead=(19, 1)),
    "three tokens d64 search": _bits(4, 2, "matched", search=True, dim=64, lead=(5, 3), dtype="float32"),
    "three tokens d256": _bits(5, 1, dim=256, lead=(3, 3), dtype="float16", statistics=False),
    "one token k8v5 search": _bits(8, 5, "matched", search=True, lead=(101, 1)),
    "no statistics": _bits(4, 4, statistics=False, dtype="float16"),
    "float32 scales": Case({"bits": 4, "scale_dtype": "float32"}, {"bits": 2, "scale_dtype": "float32"}),
}
"""Cases by name."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arguments of `encode_pages`: positional, then keywords."""

    keys: jax.Array
    values: jax.Array
    pages: Pages
    slots: jax.Array
    options: dict[str, Any]


def make_arrays(case: Case, *, heads: int = 2, seed: int = 0, scramble: bool = True) -> Arrays:
    """Random vectors, and slots for them in shuffled pages of a pool that is filled with a pattern."""
    rng = np.random.default_rng(seed)
    quantizers = [tq.make_quantizer(spec, seed=i + 3) for i, spec in enumerate(case.specs)]
    count = case.lead[0] * case.lead[1]
    pool = -(-count // case.page_size) + 2
    slots = rng.permutation(pool * case.page_size)[:count] if scramble else np.arange(count)
    slots = np.where(rng.random(count) < case.skip, -1, slots).astype(np.int32).reshape(case.lead)
    pages = jax.tree.map(patterned, empty_pages(pool, heads, case.page_size, *(spec.format for spec in case.specs)))
    shape = (*case.lead, heads, case.dim)
    keys, values = (jnp.asarray(rng.standard_normal(shape), case.dtype) for _ in range(2))
    options: dict[str, Any] = {"key": encoder(quantizers[0]), "value": encoder(quantizers[1])}
    if case.statistics:
        channels = (case.lead[0], heads, case.dim)
        options["mean"] = jnp.asarray(rng.standard_normal(channels), jnp.float32)
        options["weight"] = jnp.asarray(rng.uniform(0.5, 2.0, channels), jnp.float32)
    return Arrays(keys, values, pages, jnp.asarray(slots), options)


def patterned(array: jax.Array) -> jax.Array:
    """An array of the same shape and type, full of recognizable bytes."""
    if array.dtype == jnp.uint8:
        return jnp.full_like(array, PATTERN)
    return jnp.full_like(array, -1234.5)


@dataclasses.dataclass
class Differences:
    """Differences between two pools.

    Attributes:
        values: Codes that were compared.
        ties: Codes that differ because a channel lies at a threshold.
        scales: Stored scalars that differ by one unit in the last place.
        searched: Vectors whose search ended at another multiple, because two gains are equal to rounding.
        wrong: Descriptions of the differences that are no ties.
    """

    values: int = 0
    ties: int = 0
    scales: int = 0
    searched: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def compare(arrays: Arrays, got: Pages, want: Pages) -> Differences:
    """Counts the differences; every difference that is not a tie is wrong."""
    found = Differences()
    slots = np.asarray(arrays.slots)
    row, token = np.nonzero(slots >= 0)
    page_size = want.values.scale.shape[-1]
    page, place = slots[row, token] // page_size, slots[row, token] % page_size
    untouched = np.ones((want.values.scale.shape[0], page_size), bool)
    untouched[page, place] = False
    keys = arrays.keys.astype(jnp.float32)
    if "mean" in arrays.options:
        keys = (keys - arrays.options["mean"][:, None]) * arrays.options["weight"][:, None]
    for name, x in (("key", keys), ("value", arrays.values)):
        pools = [getattr(pages, name + "s") for pages in (got, want)]
        own, other = (_tokens(pool, page, place, channel_major=name == "value") for pool in pools)
        rest = [_rest(pool, untouched, channel_major=name == "value") for pool in pools]
        for field, array in rest[0].items():
            if not np.array_equal(array, rest[1][field]):
                found.wrong.append(f"{name} {field}: bytes of other slots changed")
        _compare_vectors(found, name, own, other, np.asarray(x.astype(jnp.float32))[row, token], arrays.options[name])
    return found


def _arrays(pool: Code) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in vars(pool).items() if array is not None}


def _tokens(pool: Code, page: np.ndarray, place: np.ndarray, *, channel_major: bool) -> dict[str, np.ndarray]:
    """Stored arrays of tokens, [tokens, heads, ...]."""
    token_major = {"signs"} | (set() if channel_major else {"packed"})
    return {
        name: array[page, :, place] if name in token_major else array[page, ..., place]
        for name, array in _arrays(pool).items()
    }


def _rest(pool: Code, untouched: np.ndarray, *, channel_major: bool) -> dict[str, np.ndarray]:
    page, place = np.nonzero(untouched)
    return _tokens(pool, page, place, channel_major=channel_major)


def _compare_vectors(found: Differences, name: str, own: dict, other: dict, x: np.ndarray, how: Encoder) -> None:
    fmt = how.format
    if not isinstance(fmt, CodebookFormat):
        _compare_groups(found, name, own, other, x, fmt)
        return
    rotated = x.astype(np.float64)
    if how.matrix is not None:
        rotated = rotated @ np.asarray(how.matrix, np.float64)
    byte, channel, changed = 0, 0, np.zeros(x.shape[:2], bool)
    for i, book in enumerate(fmt.segments):
        size = packed_bytes(book.dim, book.bits)
        y = rotated[..., channel : channel + book.dim]
        codes = [
            np.asarray(unpack(jnp.asarray(c["packed"][..., byte : byte + size]), book.bits, book.dim))
            for c in (own, other)
        ]
        steps = np.abs(y) / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-30) / (book.step or 1.0)
        different = codes[0] != codes[1]
        found.values += different.size
        searched = np.zeros(different.shape[:2], bool)
        if how.search and book.bits > 1:
            searched = _other_ends(y, steps, codes, book, different.any(-1))
            found.searched += int(searched.sum())
        for vector in np.argwhere(different & ~searched[..., None]):
            token, head, at = vector
            if _is_tie(steps[token, head], at, book, how.search):
                found.ties += 1
            else:
                found.wrong.append(f"{name} code {vector.tolist()}: {steps[token, head, at]} steps")
        changed |= different.any(-1)
        scale = [c["scale"] if fmt.num_scales == 1 else c["scale"][..., i] for c in (own, other)]
        _compare_scalars(found, f"{name} scale", scale, changed)
        byte, channel = byte + size, channel + book.dim
    if fmt.residual:
        _compare_scalars(found, f"{name} residual", [own["residual"], other["residual"]], changed)
        signs = [np.asarray(unpack(jnp.asarray(c["signs"]), 1, fmt.dim)) for c in (own, other)]
        different = (signs[0] != signs[1]) & ~changed[..., None]
        found.ties += int(different.sum())
        found.values += different.size
        if different.sum() > max(2, 1e-3 * different.size):
            found.wrong.append(f"{name}: {different.sum()} of {different.size} signs")


def _is_tie(steps: np.ndarray, at: int, book: Any, search: bool) -> bool:
    """Whether a channel is at a threshold (of some multiple, where steps are searched) or at zero."""
    thresholds = np.asarray(book.thresholds)
    if book.bits == 8:
        thresholds = np.arange(1, 128)
    thresholds = np.concatenate(
        [[0.0], np.ravel(thresholds[:, None] * reference.SEARCH_MULTIPLES) if search else thresholds]
    )
    return bool(np.min(np.abs(steps[at] - thresholds)) <= TIE * np.max(steps))


def _other_ends(
    y: np.ndarray, steps: np.ndarray, codes: list[np.ndarray], book: Any, vectors: np.ndarray
) -> np.ndarray:
    """Vectors whose codes differ because rounding chose the multiple; both codes belong to an end of the search."""
    found = np.zeros(steps.shape[:2], bool)
    for at in map(tuple, np.argwhere(vectors)):
        ends = _ends(steps[at], book)
        at_ends = [_levels(steps[at] / reference.SEARCH_MULTIPLES[end], book)[0] for end in ends]
        found[at] = len(ends) > 1 and all(
            any(_same_but_ties(code[at], index, y[at], steps[at], book) for index in at_ends) for code in codes
        )
    return found


def _ends(steps: np.ndarray, book: Any) -> set[int]:
    """Places where the search may end if rounding chooses between gains that are equal to within EQUAL_GAIN."""

    def best(places: list[int]) -> list[int]:
        levels = [_levels(steps / reference.SEARCH_MULTIPLES[place], book)[1] for place in places]
        gains = np.array([np.sum(steps * level) ** 2 / np.sum(level * level) for level in levels])
        return [place for place, gain in zip(places, gains, strict=True) if gain >= gains.max() * (1 - EQUAL_GAIN)]

    last = reference.COARSE[-1]
    return {
        end
        for middle in best(list(reference.COARSE))
        for end in best([middle, *(min(max(middle + i, 0), last) for i in reference.FINE)])
    }


def _levels(steps: np.ndarray, book: Any) -> tuple[np.ndarray, np.ndarray]:
    """Indices and magnitudes, in steps, of the nearest centroids."""
    if book.bits == 8:
        index = np.minimum(np.floor(steps), 127).astype(int)
        return index, index + 0.5
    index = np.searchsorted(book.thresholds, steps)
    return index, np.asarray(book.levels)[index] + 0.5


def _same_but_ties(code: np.ndarray, index: np.ndarray, y: np.ndarray, steps: np.ndarray, book: Any) -> bool:
    """Whether codes have the given indices and the signs of y, up to channels at thresholds."""
    if book.bits == 8:
        want = np.where(y < 0, ~index, index).astype(np.uint8)
    else:
        want = index | np.where(y < 0, 1 << (book.bits - 1), 0)
    return all(_is_tie(steps, at, book, True) for at in np.flatnonzero(code != want))


def _compare_scalars(found: Differences, name: str, scalars: list[np.ndarray], changed: np.ndarray) -> None:
    a, b = (s.astype(np.float64) for s in scalars)
    ulp = HALF_TIE if scalars[0].dtype == np.float16 else 2e-6
    different = ~((a == b) | (~np.isfinite(a) & ~np.isfinite(b))) & ~changed.reshape(
        changed.shape + (1,) * (a.ndim - 2)
    )
    far = different & ~(np.abs(a - b) <= ulp * np.abs(b) + 6e-8 * (scalars[0].dtype == np.float16))
    found.scales += int(different.sum()) if scalars[0].dtype == np.float16 else 0
    if far.any():
        found.wrong.append(f"{name}: {a[far][:3]} for {b[far][:3]}")


def _compare_groups(found: Differences, name: str, own: dict, other: dict, x: np.ndarray, fmt: Any) -> None:
    none = np.zeros(x.shape[:2], bool)
    for field in ("scale", "zero"):
        _compare_scalars(found, f"{name} {field}", [own[field], other[field]], none)
    codes = [np.asarray(unpack(jnp.asarray(c["packed"]), fmt.bits, fmt.dim)).astype(int) for c in (own, other)]
    scale, zero = (np.repeat(other[field].astype(np.float64), fmt.group, axis=-1) for field in ("scale", "zero"))
    exact = (x - zero) / scale
    same_scale = np.repeat(own["scale"] == other["scale"], fmt.group, axis=-1)
    different = (codes[0] != codes[1]) & same_scale
    found.values += different.size
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-5
    found.ties += int((different & tie).sum())
    if (different & ~tie).any():
        found.wrong.append(f"{name}: {int((different & ~tie).sum())} codes of groups")
