"""Audit of claims about bytes, length and speed, with every array of the cache counted."""

import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from tq_jax.commands.claims import Claim
from tq_jax.commands.measures import mean_cosine

HEADS = 8
CONTEXTS = (4096, 32_768, 131_072)
LONG_CONTEXT, SPEED_CONTEXT = 200_000, 30_000
RUNS = 9


def _seed_like(dim: int) -> tuple[tq.QuantizerSpec, tq.QuantizerSpec]:
    """3-bit Prod keys with dense matrices, and 2-bit grouped values."""
    key = tq.QuantizerSpec(dim=dim, bits=3, kind="prod", rotation="haar")
    return key, tq.QuantizerSpec(dim=dim, bits=2, kind="group", group=32)


def _mse(dim: int, bits: float) -> tuple[tq.QuantizerSpec, tq.QuantizerSpec]:
    spec = tq.QuantizerSpec(dim=dim, bits=bits)
    return spec, spec


def _cache_spec(key: tq.QuantizerSpec, value: tq.QuantizerSpec, tokens: int, heads: int = HEADS) -> tq.CacheSpec:
    return tq.CacheSpec(num_kv_heads=heads, head_dim=key.dim, max_tokens=tokens, key=key, value=value)


def _full_bytes(dim: int, tokens: int) -> int:
    spec = tq.CacheSpec.full_precision(num_kv_heads=HEADS, head_dim=dim, max_tokens=1)
    return spec.bytes_per_token() * tokens


def _counted(key: tq.QuantizerSpec, value: tq.QuantizerSpec, tokens: int) -> float:
    """Compression ratio to bfloat16 with everything counted: codes, scales, matrices, statistics, sinks, window."""
    return _full_bytes(key.dim, tokens) / tq.init_cache(_cache_spec(key, value, tokens), batch=1).nbytes


def ratios() -> Sequence[Claim]:
    """Compression ratios, everything counted."""
    claims = []
    for dim in (64, 128):
        for name, (key, value) in {
            "K3 Prod, V2 groups": _seed_like(dim),
            "K4, V4": _mse(dim, 4),
            "K3, V3": _mse(dim, 3),
        }.items():
            headline = _full_bytes(dim, 1) / _cache_spec(key, value, 1).bytes_per_token()
            counted = {f"{tokens // 1024}k": _counted(key, value, tokens) for tokens in CONTEXTS}
            listed = ", ".join(f"{ratio:.2f}x at {tokens}" for tokens, ratio in counted.items())
            indices = 32 / (key.bits + value.bits)
            claims.append(
                Claim(
                    f'"{headline:.1f}x compression" ({name}, d={dim}), share of it left at 4k tokens',
                    counted["4k"] / headline,
                    "<=",
                    0.98,
                    judgement="misleading at short context",
                    note=f"with matrices, scales, window and sinks: {listed}; counting only index bits: {indices:.1f}x",
                    details=counted | {"headline": headline, "indices_only": indices},
                )
            )
    return claims


def own_ratios() -> Sequence[Claim]:
    """The default cache, everything counted."""
    claims = []
    for dim, bound in ((64, 3.6), (128, 3.7)):
        ratio = _counted(*_mse(dim, 4), 32_768)
        name = f"4-bit keys and values at 32k tokens, d={dim}: ratio with everything counted"
        claims.append(Claim(name, ratio, ">=", bound, judgement="true", note="one layer, 8 heads, batch 1"))
    return claims


def fractional_bits() -> Sequence[Claim]:
    """Stored bits of 2.5-bit and 3.5-bit codes."""
    x = jax.random.normal(jax.random.key(0), (64, 128))
    stored = {}
    for bits in (2.5, 3.5):
        code = jax.jit(tq.quantize)(tq.make_quantizer(tq.QuantizerSpec(dim=128, bits=bits)), x)
        stored[bits] = (8 * code.nbytes / x.size, 8 * code.packed.nbytes / x.size)
    off = max(abs(total - bits) for bits, (total, _) in stored.items())
    parts = "; ".join(f"{indices:.2f} bits of indices, {total:.2f} stored" for total, indices in stored.values())
    return [
        Claim(
            '"2.5 and 3.5 bits per channel" (deviation of stored bits, d=128)',
            off,
            "<=",
            0.0,
            judgement="true with the norms counted",
            note=parts,
        )
    ]


def twice_the_context() -> Sequence[Claim]:
    """Tokens in the same memory."""
    key, value = _mse(128, 4)
    stored = tq.init_cache(_cache_spec(key, value, 65_536), batch=1).nbytes
    return [
        Claim(
            '"Twice the context in the same memory" (bytes of 32k bfloat16 tokens over those of 64k at 4 bits)',
            _full_bytes(128, 32_768) / stored,
            ">=",
            1.0,
            judgement="true of the cache",
            note="attention layers' cache only: weights, activations and recurrent layers do not shrink",
        )
    ]


def _filled(spec: tq.CacheSpec, k: jax.Array, v: jax.Array, chunk: int = 8192) -> tq.Cache:
    step = jax.jit(tq.append, donate_argnums=0)
    cache = tq.init_cache(spec, batch=1)
    for start in range(0, k.shape[1], chunk):
        cache = step(cache, k[:, start : start + chunk], v[:, start : start + chunk])
    return cache


def _tokens(count: int, heads: int, dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [1, 1, 64, dim] whose logits have standard deviation 2; keys and values [1, count, heads, dim]."""
    rq, rk, rv = jax.random.split(jax.random.key(1), 3)
    k, v = jax.random.normal(rk, (1, count, heads, dim)), jax.random.normal(rv, (1, count, heads, dim))
    return 2.0 * jax.random.normal(rq, (1, 1, 64, dim)), k, v


@jax.jit
def _exact_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Float32 attention of [1, 1, heads, dim] queries to one head of keys and values [1, n, 1, dim]."""
    logits = jnp.einsum("hd,nd->hn", q[0, 0], k[0, :, 0], precision="highest") / math.sqrt(q.shape[-1])
    return jnp.einsum("hn,nd->hd", jax.nn.softmax(logits), v[0, :, 0], precision="highest")[None, None]


def long_context() -> Sequence[Claim]:
    """Attention at 200k tokens."""
    q, k, v = _tokens(LONG_CONTEXT, 1, 128)
    cosines = {}
    for tokens in (4000, LONG_CONTEXT):
        keys, values = k[:, :tokens], v[:, :tokens]
        cache = _filled(_cache_spec(*_mse(128, 4), tokens, heads=1), keys, values)
        exact, out = _exact_attention(q, keys, values), tq.attend(q, cache)
        cosines[tokens] = mean_cosine(exact[0, 0], out[0, 0])
    return [
        Claim(
            '"200k tokens of context work" (cosine of 4-bit attention outputs to exact ones, 200,000 tokens)',
            cosines[LONG_CONTEXT],
            ">=",
            0.96,
            judgement="true of one layer",
            note=f"{cosines[4000]:.4f} at 4,000 tokens; that nothing crashed would show nothing",
            details={str(tokens): cosine for tokens, cosine in cosines.items()},
        )
    ]


def _flops(function: Callable, *args) -> float:
    analysis = jax.jit(function).lower(*args).compile().cost_analysis() or {}
    return analysis.get("flops", math.nan)


def dequantize_first() -> Sequence[Claim]:
    """Compute of dequantizing the history."""
    dim, tokens = 128, 4096
    q, k, v = _tokens(tokens, 1, dim)
    key, value = (tq.make_quantizer(spec, seed=i) for i, spec in enumerate(_mse(dim, 4)))
    codes = jax.jit(tq.quantize)(key, k), jax.jit(tq.quantize)(value, v)

    def hybrid(q: jax.Array, coded: tq.Code, coded_values: tq.Code) -> jax.Array:
        return _exact_attention(q, tq.dequantize(key, coded), tq.dequantize(value, coded_values))

    work = {"exact": _flops(_exact_attention, q, k, v), "dequantize first": _flops(hybrid, q, *codes)}
    ratio = work["dequantize first"] / work["exact"]
    stored, expanded = sum(code.nbytes for code in codes), k.nbytes + v.nbytes
    return [
        Claim(
            '"Decoding by dequantizing first saves compute" (operations over those of exact attention)',
            ratio,
            ">=",
            1.0,
            judgement="storage yes, compute no",
            note=f"{stored:,} stored bytes become {expanded:,} in every step; 64 queries per head, {tokens} tokens",
            details=work,
        )
    ]


def _seconds(function: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def speed() -> Sequence[Claim]:
    """Speed at 30k tokens, on this device."""
    dim = 128
    q, k, v = _tokens(SPEED_CONTEXT, HEADS, dim)
    q = q[:, :, : 4 * HEADS]
    compressed = _filled(_cache_spec(*_mse(dim, 4), SPEED_CONTEXT), k, v)
    full = _filled(tq.CacheSpec.full_precision(num_kv_heads=HEADS, head_dim=dim, max_tokens=SPEED_CONTEXT), k, v)
    for cache in (compressed, full):
        _seconds(lambda cache=cache: tq.attend(q, cache))  # compiles
    pairs = [[_seconds(lambda cache=cache: tq.attend(q, cache)) for cache in (compressed, full)] for _ in range(RUNS)]
    runs = [ours / theirs for ours, theirs in pairs]
    low, median, high = (float(x) for x in np.quantile(runs, (0.25, 0.5, 0.75)))
    kind = jax.devices()[0].device_kind
    return [
        Claim(
            f'"Faster at 30k tokens" (time of attention over that from bfloat16, median of {RUNS} paired runs)',
            median,
            "<=",
            5.0,
            judgement="true here" if high < 1 else "false here" if low > 1 else "within noise",
            note=f"on {kind}: quartiles {low:.2f} to {high:.2f}; single runs show {min(runs):.2f} to {max(runs):.2f}",
            details={"runs": runs},
        )
    ]


CHECKS = (ratios, own_ratios, fractional_bits, twice_the_context, long_context, dequantize_first, speed)
