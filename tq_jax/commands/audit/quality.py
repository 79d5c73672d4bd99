"""Audit of claims about accuracy: retrieval, cosines, values, unbiasedness, scales, shared means, rotations."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import tq_jax as tq
from tq_jax.commands.claims import Claim
from tq_jax.commands.measures import (
    attention_divergence,
    correlated,
    distortion,
    found,
    keys_with_outliers,
    mean_cosine,
    recall,
    restore,
    scores,
    sphere,
    unit,
)

DIM, TOKENS, NEEDLES = 128, 4096, 512
UPPER = math.sqrt(3) * math.pi / 2


def _mse(bits: float, **options) -> tq.QuantizerSpec:
    return tq.QuantizerSpec(**({"dim": DIM, "bits": bits, "kind": "mse", "scale": "unbiased"} | options))


def _prod(bits: int) -> tq.QuantizerSpec:
    return tq.QuantizerSpec(dim=DIM, bits=bits, kind="prod")


def needles() -> Sequence[Claim]:
    """Needles that queries copy, and needles that queries only resemble."""
    key = sphere(1, TOKENS, DIM)
    one_bit = found(scores(key[:NEEDLES], restore(_mse(1), key)))
    figures = {}
    for cosine in (0.5, 0.4, 0.35):
        query = correlated(key[:NEEDLES], cosine, seed=2)
        figures[f"cosine {cosine}, exact"] = found(scores(query, key))
        for bits in (2, 3, 4):
            figures[f"cosine {cosine}, {bits} bits"] = found(scores(query, restore(_mse(bits), key)))
    kept = figures["cosine 0.35, 3 bits"] / figures["cosine 0.35, exact"]
    hard = ", ".join(f"{name[13:]} {figures[name]:.2f}" for name in figures if name.startswith("cosine 0.35"))
    name, trivial = '"Needle in a haystack passes"', "true but trivial"
    copied = "found with 1 bit per channel where the query copies a key: the test cannot fail"
    note = f"share of the needles that exact scores find which is kept at 3 bits; found: {hard}"
    apart = f"{name}, queries at cosine 0.35 to their key"
    return [
        Claim(name, one_bit, ">=", 0.99, judgement=trivial, note=copied),
        Claim(apart, kept, "<=", 0.97, judgement="not lossless", note=note, details=figures),
    ]


def recall_bar() -> Sequence[Claim]:
    """Recall at 8 and at 1."""
    query, key = sphere(3, NEEDLES, DIM), sphere(1, TOKENS, DIM)
    exact = scores(query, key)
    specs = {"2-bit MSE": _mse(2), "3-bit MSE": _mse(3), "4-bit MSE": _mse(4), "3-bit Prod": _prod(3)}
    estimated = {name: scores(query, restore(spec, key)) for name, spec in specs.items()}
    at8 = {name: recall(exact, table, 8) for name, table in estimated.items()}
    at1 = {name: recall(exact, table, 1) for name, table in estimated.items()}
    sharp = scores(correlated(key[:NEEDLES], 0.7, seed=4), restore(_prod(3), key))
    bar, kept = '"Recall@8 >= 0.40 at 3 bits"', '"Dominant tokens are always preserved"'
    note = f"2-bit MSE codes pass it; recall@1: {_listed(at1)}"
    first = "3-bit Prod, one key at cosine 0.7 among 4096: it stays first; this says nothing about the other weights"
    both = {"recall@8": at8, "recall@1": at1}
    return [
        Claim(bar, at8["2-bit MSE"], ">=", 0.40, judgement="low bar", note=note, details=both),
        Claim(kept, found(sharp), ">=", 0.99, judgement="true", note=first),
    ]


def lossless_keys() -> Sequence[Claim]:
    """Cosine of quantized keys."""
    key = sphere(5, TOKENS, DIM)
    figures = {f"{bits} bits": mean_cosine(key, restore(_mse(bits), key)) for bits in (2, 3, 4)}
    return [
        Claim(
            '"3-bit keys have cosine 1.000000"',
            figures["3 bits"],
            "<=",
            0.99,
            judgement="false",
            note=f"no code of b bits exceeds sqrt(1 - 4^-b), {math.sqrt(1 - 4**-3):.4f} at 3; {_listed(figures, 4)}",
            details=figures,
        )
    ]


def values() -> Sequence[Claim]:
    """Values: groups against TurboQuant at the same bytes."""
    x = jax.random.normal(jax.random.key(6), (TOKENS, DIM))
    specs = {
        "2-bit groups": tq.QuantizerSpec(dim=DIM, bits=2, kind="group", group=32),
        "TurboQuant 2.5": _mse(2.5, scale="least_squares"),
        "TurboQuant 3": _mse(3, scale="least_squares"),
        "4-bit groups": tq.QuantizerSpec(dim=DIM, bits=4, kind="group", group=32),
        "TurboQuant 4": _mse(4, scale="least_squares"),
    }
    cosines = {f"{name} ({spec.bytes_per_vector} B)": mean_cosine(x, restore(spec, x)) for name, spec in specs.items()}
    groups, fewer, same, *_ = (1 - cosine for cosine in cosines.values())
    worst = '"2-bit values are the bottleneck" (1 - cosine, groups over TurboQuant 3)'
    size = '"2-bit groups take 2 bits" (1 - cosine, groups over TurboQuant 2.5)'
    verdict, note = (
        "true of min-max groups",
        "scale and zero make them 3 bits; TurboQuant with a sixth fewer bytes is closer",
    )
    return [
        Claim(worst, groups / same, ">=", 2.0, judgement=verdict, note=_listed(cosines), details=cosines),
        Claim(size, groups / fewer, ">=", 1.0, judgement="misleading", note=note, details=cosines),
    ]


def prod_attention() -> Sequence[Claim]:
    """Prod against MSE on attention."""
    _, std, deviation = keys_with_outliers(7, TOKENS, DIM, mean_norm=0.0)
    key, query = std * deviation, _queries(std)
    figures = {}
    for bits in (3, 4):
        for name, spec in {"MSE": _mse(bits), "Prod": _prod(bits)}.items():
            figures[f"{name} {bits} bits"] = _divergence(query, key, restore(spec, key))
    unbiased = '"Unbiased inner products keep attention accurate" (KL of Prod over MSE, 4 bits)'
    over, verdict = figures["Prod 4 bits"] / figures["MSE 4 bits"], "misleading"
    note = f"attention KL in nats: {_listed(figures)}; Prod pays for its zero bias with variance"
    return [Claim(unbiased, over, ">=", 2.0, judgement=verdict, note=note, details=figures)]


def _divergence(query: jax.Array, key: jax.Array, restored: jax.Array) -> float:
    exact, estimated = (scores(query, k) / math.sqrt(DIM) for k in (key, restored))
    return attention_divergence(exact, estimated)


def _queries(std: jax.Array) -> jax.Array:
    """Queries that weigh every channel equally, with logits of standard deviation 1.5."""
    return 1.5 * jax.random.normal(jax.random.key(8), (256, DIM)) / std


def scale_precision() -> Sequence[Claim]:
    """Half precision scales."""
    _, std, deviation = keys_with_outliers(9, 10_240, DIM, mean_norm=0.0)
    key, query = std * deviation, 4.0 * _queries(std)
    value = jax.random.normal(jax.random.key(10), key.shape)
    outputs = {}
    for name, restored in {
        "exact": key,
        "float32": restore(_mse(4, scale_dtype="float32"), key),
        "float16": restore(_mse(4, scale_dtype="float16"), key),
    }.items():
        weights = jax.nn.softmax(scores(query, restored) / math.sqrt(DIM))
        outputs[name] = jnp.einsum("qn,nd->qd", weights, value, precision="highest")
    by_rounding = float(jnp.linalg.norm(outputs["float16"] - outputs["float32"]))
    by_codes = float(jnp.linalg.norm(outputs["float32"] - outputs["exact"]))
    largest = float(jnp.max(jnp.abs(scores(query, key)))) / math.sqrt(DIM)
    return [
        Claim(
            '"float16 norms are a trap" (output error from rounding over error from 4-bit codes)',
            by_rounding / by_codes,
            "<=",
            0.1,
            judgement="not seen in one layer",
            note=f"10,240 tokens, logits up to {largest:.0f}; a norm above 65504, the end of float16, is refused",
        )
    ]


def shared_mean() -> Sequence[Claim]:
    """Keys around a large shared mean."""
    mean, std, deviation = keys_with_outliers(11, TOKENS, DIM, mean_norm=300.0)
    key, query = mean + std * deviation, _queries(std)
    spec, centre = _mse(4, scale="norm"), jnp.mean(key, axis=0, keepdims=True)
    restored = {"plain": restore(spec, key), "centred": centre + restore(spec, key - centre)}
    kl = {name: _divergence(query, key, k) for name, k in restored.items()}
    needle = correlated(unit(deviation[:NEEDLES]), 0.5, seed=12) / std
    hits = {name: found(scores(needle, k)) for name, k in ({"exact": key} | restored).items()}
    plain = restored["plain"]
    mse = float(jnp.mean(jnp.sum((key - plain) ** 2, axis=-1)) / jnp.mean(jnp.sum(key**2, axis=-1)))
    return [
        Claim(
            '"Low MSE means the model works" (attention KL, 4-bit keys around a mean of norm 300)',
            kl["plain"],
            ">=",
            1.0,
            judgement="misleading",
            note=f"destroyed at relative MSE {mse:.4f} and cosine {mean_cosine(key, plain):.4f}, as theory promises",
            details=kl,
        ),
        Claim(
            "Subtracting the mean repairs it (attention KL, plain over centred)",
            kl["plain"] / kl["centred"],
            ">=",
            20.0,
            judgement="true",
            note=f"KL {_listed(kl)}; needles at cosine 0.5: {_listed(hits)}",
            details={"kl": kl, "needles": hits},
        ),
        _centred_cache(query, key),
    ]


def _centred_cache(query: jax.Array, key: jax.Array) -> Claim:
    """Attention outputs of a cache that centres its keys, and of one that does not."""
    value = jax.random.normal(jax.random.key(16), key.shape)
    weights = jax.nn.softmax(scores(query, key) / math.sqrt(DIM))
    exact = jnp.einsum("qn,nd->qd", weights, value, precision="highest")
    cosines = {}
    for name, center, smooth in (("plain", False, False), ("centred", True, False), ("smoothed too", True, True)):
        spec = tq.CacheSpec(
            num_kv_heads=1,
            head_dim=DIM,
            max_tokens=TOKENS,
            key=_mse(4),
            value=_mse(4, scale="least_squares"),
            center_keys=center,
            smooth_keys=smooth,
        )
        cache = tq.init_cache(spec, batch=1)
        cache = tq.append(cache, key[None, :, None], value[None, :, None], query=jnp.resize(query, (1, TOKENS, 1, DIM)))
        cosines[name] = mean_cosine(exact, _attend_all(query, cache))
    return Claim(
        "The cache repairs it: center_keys, smooth_keys (cosine of attention outputs)",
        cosines["smoothed too"],
        ">=",
        0.9,
        judgement="true",
        note=_listed(cosines),
        details=cosines,
    )


def _attend_all(query: jax.Array, cache: tq.Cache) -> jax.Array:
    """Outputs of queries that all see the whole cache, because they are heads of one token."""
    return tq.attend(query[None, None], cache)[0, 0]


def scaling() -> Sequence[Claim]:
    """Distortion against 4^-b, normalized and not."""
    x = sphere(13, TOKENS, DIM)
    measured = [distortion(_mse(bits, scale="norm"), x) for bits in (1, 2, 3, 4)]
    share = max(m * 4**bits for bits, m in enumerate(measured, start=1)) / UPPER
    steps = ", ".join(f"{a / b:.2f}" for a, b in itertools.pairwise(measured))
    return [
        Claim(
            '"Distortion follows 1/4^b" (largest share of the bound, unit vectors)',
            share,
            "<=",
            1.0,
            judgement="true",
            note=f"each further bit divides it by {steps}, towards 4; absolute error grows with the squared norm",
        )
    ]


def rotations() -> Sequence[Claim]:
    """Hadamard against Haar rotations."""
    spread, one_hot = sphere(14, TOKENS, DIM), jnp.eye(DIM)
    _, std, deviation = keys_with_outliers(15, TOKENS, DIM, mean_norm=0.0)
    haar, hadamard = _mse(2, scale="norm", rotation="haar"), _mse(2, scale="norm")
    ratios = {
        name: distortion(hadamard, x, seed=1) / distortion(haar, x, seed=1)
        for name, x in {"random": spread, "outlier channels": std * deviation, "one-hot": one_hot}.items()
    }
    return [
        Claim(
            '"A Hadamard rotation is as good as a Haar rotation" (distortion ratio, one-hot vectors, 2 bits)',
            ratios["one-hot"],
            ">=",
            1.5,
            judgement="not for sparse vectors",
            note=f"one-hot vectors land on equal magnitudes, between the centroids; ratios: {_listed(ratios)}",
            details=ratios,
        ),
    ]


def _listed(figures: dict[str, float], digits: int = 3) -> str:
    return ", ".join(f"{name} {figure:.{digits}f}" for name, figure in figures.items())


CHECKS = (
    needles,
    recall_bar,
    lossless_keys,
    values,
    prod_attention,
    scale_precision,
    shared_mean,
    scaling,
    rotations,
)
