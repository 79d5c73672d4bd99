import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tq_jax as tq
from pallas_kernels.attention import TileConfig

H, G, D = 2, 3, 32
EIGHT = tq.QuantizerSpec(D, 8, scale_dtype="float32")


def make_spec(**options):
    defaults = dict(
        num_kv_heads=H, head_dim=D, max_tokens=400, key=EIGHT, value=EIGHT, window=24, page_size=16, dtype="float32"
    )
    return tq.CacheSpec(**(defaults | options))


def tokens(batch, count, seed=0):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, batch, count, H, D)).astype(np.float32)
    return (
        jnp.asarray(k * 2 + 3),
        jnp.asarray(v),
        jnp.asarray(rng.standard_normal((batch, count, H * G, D)), jnp.float32),
    )


def dense(q, k, v, *, scale=D**-0.5, sliding_window=None, softcap=None, sink_logits=None):
    """Causal softmax attention of the last queries in numpy, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    t, n = q.shape[1], k.shape[1]
    k, v = np.repeat(k, G, 2), np.repeat(v, G, 2)
    logits = np.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    distance = np.arange(n - t, n)[:, None] - np.arange(n)[None]
    logits = np.where((distance >= 0) & (distance < (sliding_window or n + 1)), logits, -np.inf)
    peak = logits.max(-1, keepdims=True)
    p = np.exp(logits - peak)
    total = p.sum(-1, keepdims=True)
    if sink_logits is not None:
        total = total + np.exp(np.asarray(sink_logits)[None, :, None, None] - peak)
    return np.einsum("bhts,bshd->bthd", p / total, v)


OPTIONS = [
    {},
    {"sliding_window": 1},
    {"sliding_window": 100},
    {"softcap": 5.0},
    {"scale": 0.05},
    {"sink_logits": jnp.linspace(-1, 4, H * G)},
    {"sliding_window": 30, "softcap": 3.0, "sink_logits": jnp.zeros(H * G), "scale": 0.4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("count", "full"), [(1, False), (150, False), (7, True)])
def test_parity_with_dense_attention(count, options, full):
    spec = (
        tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=400, dtype="float32")
        if full
        else make_spec()
    )
    k, v, q = tokens(2, 200)
    cache = tq.append(tq.init_cache(spec, batch=2), k, v, query=q)
    out = tq.attend(q[:, -count:], cache, **options)
    want = dense(q[:, -count:], k, v, **options)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    assert error < (2e-6 if full else 0.015)
    np.testing.assert_array_equal(out, tq.attend(q[:, -count:], cache, **options))


@pytest.mark.sampled
@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("statistics", [False, True])
def test_attention_is_over_the_dequantized_cache(window, sinks, statistics):
    """The rotated domain, centring and smoothing are exact: only the codes err."""
    spec = make_spec(
        window=window, sink_tokens=sinks, center_keys=statistics, smooth_keys=statistics,
        key=tq.QuantizerSpec(D, 3, kind="prod"), value=tq.QuantizerSpec(D, 2.5),
    )  # fmt: skip
    k, v, q = tokens(1, 120)
    cache = tq.append(tq.init_cache(spec, batch=1), k, v, query=q)
    mean, weight = (
        (cache.statistics.mean, cache.statistics.weight) if statistics else (jnp.zeros((1, H, D)), jnp.ones((1, H, D)))
    )
    quantized = tq.dequantize(
        cache.key_quantizer, tq.quantize(cache.key_quantizer, (k - mean[:, None]) * weight[:, None])
    )
    k_hat = quantized / weight[:, None] + mean[:, None]
    v_hat = tq.dequantize(cache.value_quantizer, tq.quantize(cache.value_quantizer, v))
    held = slice(sinks, 120 - window)
    k, v = k.at[:, held].set(k_hat[:, held]), v.at[:, held].set(v_hat[:, held])
    np.testing.assert_allclose(tq.attend(q[:, -5:], cache), dense(q[:, -5:], k, v), atol=2e-3)


def test_a_sliding_window_beyond_the_cache_is_none():
    k, v, q = tokens(2, 200)
    cache = tq.append(tq.init_cache(make_spec(), batch=2), k, v, query=q)
    for window in (400, 2**40):
        found = tq.attend(q[:, -1:], cache, sliding_window=window)
        np.testing.assert_array_equal(found, tq.attend(q[:, -1:], cache))


def test_ragged_chunks():
    k, v, q = tokens(3, 60)
    cache = tq.append(tq.init_cache(make_spec(), batch=3), k, v, query=q, lengths=jnp.asarray([60, 33, 60], jnp.int32))
    k2, v2, q2 = tokens(3, 8, seed=1)
    lengths = jnp.asarray([8, 3, 0], jnp.int32)
    cache = tq.append(cache, k2, v2, query=q2, lengths=lengths)
    out = tq.attend(q2, cache, lengths=lengths)
    for row, (before, new) in enumerate([(60, 8), (33, 3), (60, 0)]):
        both = [
            jnp.concatenate([a[row : row + 1, :before], b[row : row + 1, :new]], axis=1) for a, b in ((k, k2), (v, v2))
        ]
        want = dense(q2[row : row + 1, :new], *both)
        np.testing.assert_allclose(out[row, :new], want[0], atol=0.03)
        np.testing.assert_array_equal(out[row, new:], np.zeros((8 - new, H * G, D)))


def test_empty_rows_give_zero_and_sinks_take_all():
    cache = tq.init_cache(make_spec(), batch=1)
    q = jnp.ones((1, 1, H * G, D))
    np.testing.assert_array_equal(tq.attend(q, cache), np.zeros(q.shape))
    np.testing.assert_array_equal(tq.attend(q, cache, sink_logits=jnp.zeros(H * G)), np.zeros(q.shape))


def test_one_token_prompt():
    k, v, q = tokens(1, 1)
    cache = tq.append(tq.init_cache(make_spec(window=0, sink_tokens=0), batch=1), k, v, query=q)
    np.testing.assert_allclose(tq.attend(q, cache), jnp.repeat(v, G, axis=2), atol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype):
    k, v, q = (x.astype(dtype) for x in tokens(1, 100))
    cache = tq.append(tq.init_cache(make_spec(dtype=dtype), batch=1), k, v, query=q)
    out = tq.attend(q[:, -1:], cache)
    assert out.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(out, np.float32), dense(q[:, -1:], k, v), atol=0.03)


def test_centring_saves_keys_with_a_shared_mean():
    """A mean of norm hundreds, as key biases give real models, destroys plain codes; centring repairs them."""
    k, v, q = tokens(1, 200)
    k = k.at[..., 5].add(300.0).at[..., 20].add(-200.0)
    errors = []
    for center in (True, False):
        spec = make_spec(key=tq.QuantizerSpec(D, 4, scale="unbiased"), center_keys=center, smooth_keys=False)
        cache = tq.append(tq.init_cache(spec, batch=1), k, v, query=q)
        want = dense(q[:, -1:], k, v)
        errors.append(np.linalg.norm(tq.attend(q[:, -1:], cache) - want) / np.linalg.norm(want))
    assert errors[0] < 0.2 < 0.5 < errors[1]


def test_rows_sharded_over_devices():
    k, v, q = tokens(4, 60)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cache = tq.init_cache(make_spec(), batch=4)
    whole = jax.tree.map(lambda _: P("data"), cache)
    layout = dataclasses.replace(
        whole,
        key_quantizer=jax.tree.map(lambda _: P(), cache.key_quantizer),
        value_quantizer=jax.tree.map(lambda _: P(), cache.value_quantizer),
    )

    def step(cache, k, v, q):
        cache = tq.append(cache, k, v, query=q)
        return cache, tq.attend(q[:, -1:], cache)

    data = P("data")
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(layout, data, data, data), out_specs=(layout, data))
    new, out = jax.jit(sharded)(cache, k, v, q)
    want_cache, want = jax.jit(step)(cache, k, v, q)
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert new.compressed.tolist() == want_cache.compressed.tolist()


def test_explicit_axes_of_a_mesh_are_refused():
    """`jax.make_mesh` has them by default; JAX would refuse a scatter by a message about its output."""
    k, v, q = tokens(4, 60)
    spread = jax.NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
    cache, placed = tq.init_cache(make_spec(), batch=4), jax.device_put((k, v, q), spread)
    message = (
        "arrays spread over explicit axes of a mesh are not supported, got float32.*: call it inside jax.shard_map"
    )
    with pytest.raises(NotImplementedError, match=f"append: {message}"):
        tq.append(cache, *placed[:2])
    with pytest.raises(NotImplementedError, match=f"attend: {message}"):
        jax.jit(tq.attend)(placed[2], cache)


def test_64_bit_jax():
    k, v, q = tokens(2, 40)
    want = tq.attend(q[:, -1:], tq.append(tq.init_cache(make_spec(), batch=2), k, v, query=q))
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (k, v, q)]
        cache = tq.append(tq.init_cache(make_spec(), batch=2), *wide[:2], query=wide[2], lengths=jnp.array([40, 40]))
        found = tq.attend(wide[2][:, -1:], cache, rows=jnp.array([0, 1]))
    assert found.dtype == np.float64
    assert {x.dtype.itemsize for x in jax.tree.leaves(cache)} <= {1, 2, 4}
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_under_scan():
    k, v, q = tokens(1, 100)
    cache = tq.append(tq.init_cache(make_spec(), batch=1), k, v, query=q)

    def step(cache, x):
        k, v, q = x
        cache = tq.append(cache, k, v, query=q)
        return cache, tq.attend(q, cache)

    new = [jnp.swapaxes(x, 0, 1)[:, None] for x in tokens(1, 12, seed=4)]
    scanned, outs = jax.lax.scan(step, cache, tuple(new))
    looped = cache
    for i in range(12):
        looped, out = step(looped, tuple(x[i] for x in new))
        np.testing.assert_allclose(outs[i], out, atol=1e-5)
    assert scanned.length.tolist() == looped.length.tolist() == [112]


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors():
    cache = tq.init_cache(make_spec(), batch=2)
    q = jnp.ones((2, 1, 4, D))
    shape = r"expected query of shape \(2, tokens, a multiple of 2, 32\), got "
    cases = [
        (ValueError, shape + r"\(1, 1, 4, 32\)", q[:1], {}),
        (ValueError, shape + r"\(2, 1, 3, 32\)", q[:, :, :3], {}),
        (ValueError, shape + r"\(2, 1, 4, 16\)", q[..., :16], {}),
        (ValueError, "expected floating point queries, got dtype int32", q.astype(jnp.int32), {}),
        (ValueError, "expected sliding_window above 0, got 0", q, {"sliding_window": 0}),
        (ValueError, "expected softcap above 0, got -1.0", q, {"softcap": -1.0}),
        (ValueError, "expected softcap above 0, got nan", q, {"softcap": jnp.nan}),
        (ValueError, "expected softcap above 0 and finite, got inf", q, {"softcap": jnp.inf}),
        (ValueError, r"expected lengths from 0 to 1, got \[2, 1\]", q, {"lengths": jnp.asarray([2, 1])}),
        (ValueError, r"expected rows from 0 to 1, got \[0, -1\]", q, {"rows": jnp.asarray([0, -1])}),
        (ValueError, r"expected rows from 0 to 1, got \[0, 2\]", q, {"rows": jnp.asarray([0, 2])}),
        (ValueError, r"expected sink_logits of shape \(4,\), got \(3,\)", q, {"sink_logits": jnp.zeros(3)}),
        (ValueError, r"expected rows to be integers of shape \(2,\), got float32 \(2,\)", q, {"rows": jnp.zeros(2)}),
        (
            NotImplementedError,
            "implementation='mosaic'; attend has: ",
            q,
            {"implementation": "mosaic"},
        ),
        (ValueError, "expected config without precise", q, {"config": TileConfig(), "precise": True}),
        (ValueError, "and not for the reference", q, {"config": TileConfig(), "implementation": "reference"}),
        (NotImplementedError, "head dims .*, got 32 and 32", q, {"implementation": "triton"}),
    ]
    for error, message, query, options in cases:
        with pytest.raises(error, match=message):
            tq.attend(query, cache, **options)


def test_scale_rule_of_keys_defaults_to_unbiased():
    spec = make_spec(key=tq.QuantizerSpec(D, 4), value=tq.QuantizerSpec(D, 4))
    assert (spec.key.scale_rule, spec.value.scale_rule) == ("unbiased", "least_squares")
    assert dataclasses.replace(spec, key=tq.QuantizerSpec(D, 4, kind="prod")).key.scale_rule == "norm"
