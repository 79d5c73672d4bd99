"""`CompressedAttention` against `nnx.MultiHeadAttention`, whose weights it shares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tq_jax as tq
from tq_jax.nnx import CompressedAttention, RotaryAttention

FEATURES, HEADS, TOKENS, BATCH, VOCABULARY = 48, 4, 40, 2, 17
OPTIONS = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "normalize_qk": True, "use_bias": False},
    {"qkv_features": 96, "out_features": 20},
]
WITH_ROPE = pytest.mark.skipif(
    not hasattr(nnx, "dot_product_attention_with_rope"), reason="this release of Flax has no rotary embedding"
)


def pair(*, cache_spec=None, rope_base=None, **options):
    """Flax's attention, and ours with the same weights."""
    options = {"num_heads": HEADS, "in_features": FEATURES, "qkv_features": 64, **options}
    bias = nnx.initializers.normal(0.5)
    theirs = nnx.MultiHeadAttention(**options, bias_init=bias, decode=True, rngs=nnx.Rngs(0))
    ours = CompressedAttention(
        **options, bias_init=bias, decode=True, rngs=nnx.Rngs(1), cache_spec=cache_spec, rope_base=rope_base
    )
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    return theirs, ours


def full(heads=HEADS, dim=16):
    return tq.CacheSpec.full_precision(num_kv_heads=heads, head_dim=dim, max_tokens=1, dtype="float32")


def compressed(bits, **fields):
    small = dict(window=8, sink_tokens=2, page_size=16, dtype="float32")
    return tq.CacheSpec.recommended(2, 16, TOKENS, key_bits=bits, value_bits=bits, **(small | fields))


def inputs(count=TOKENS, seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, count, FEATURES))


def make(spec=None, **options):
    layer = CompressedAttention(
        HEADS, FEATURES, 64, num_kv_heads=2, cache_spec=spec, decode=True, rngs=nnx.Rngs(0), **options
    )
    layer.init_cache((BATCH, TOKENS, FEATURES))
    return layer


def in_chunks(layer, x, sizes):
    parts, start = [], 0
    for size in sizes:
        parts.append(layer(x[:, start : start + size]))
        start += size
    return jnp.concatenate(parts, axis=1)


@pytest.mark.sampled
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decode_in_full_precision_equals_flax(options):
    dim = options.get("qkv_features", 64) // HEADS
    theirs, ours = pair(cache_spec=full(options.get("num_kv_heads", HEADS), dim), **options)
    x = inputs(20)
    for layer in (theirs, ours):
        layer.init_cache((BATCH, TOKENS, FEATURES))
    step = nnx.jit(lambda layer, token: layer(token))
    want = jnp.concatenate([step(theirs, x[:, i : i + 1]) for i in range(20)], axis=1)
    np.testing.assert_allclose(in_chunks(ours, x, [1] * 5 + [15]), want, atol=2e-6, rtol=2e-6)
    assert ours.cache.get_value().length.tolist() == [int(theirs.cache_index[...])] * BATCH


def test_calls_without_decode_are_those_of_flax():
    theirs, ours = pair(cache_spec=full())
    x, memory = inputs(), inputs(7, seed=1)
    np.testing.assert_array_equal(ours(x, memory, decode=False), theirs(x, memory, decode=False))
    assert ours.cache is None


@pytest.mark.parametrize("sizes", [[TOKENS], [30, 1, 1, 8]], ids=str)
@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_decode_equals_one_causal_call(sizes, rope_base):
    _, ours = pair(cache_spec=full(), rope_base=rope_base)
    ours.init_cache((BATCH, TOKENS, FEATURES))
    x = inputs()
    want = ours(x, decode=False, is_causal=True)
    np.testing.assert_allclose(in_chunks(ours, x, sizes), want, atol=3e-6, rtol=3e-6)


def turned(x, base):
    """Rotary embedding of complex pairs, in numpy, float64."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def test_rotary_embedding():
    """The score of two tokens that are turned is that of complex numbers."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 9, 1, 16))
    scores = np.einsum("bthd,bshd->bts", turned(q, 50.0), turned(k, 50.0)) / 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bts,bshd->bthd", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))
    np.testing.assert_allclose(RotaryAttention(50.0)(q, k, v), want, atol=1e-5)


@WITH_ROPE
def test_rotary_embedding_of_flax():
    """`attention_fn` of Flax, with its base, is understood."""
    rope = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(100.0))
    assert make(full(2), attention_fn=rope).rope_base == 100.0
    theirs, ours = pair(cache_spec=full(), rope_base=100.0)
    theirs.attention_fn = rope
    ours.init_cache((BATCH, TOKENS, FEATURES))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = theirs(inputs(), decode=False, is_causal=True)
    np.testing.assert_allclose(ours(inputs()), want, atol=1e-5)


def feed(schedule, padding):
    """Outputs of each row, and lengths, of ragged chunks of at most 20 tokens; padding holds anything."""
    layer, x = make(compressed(4), rope_base=1e4), inputs()
    step = nnx.jit(lambda layer, x, lengths: layer(x, lengths=lengths))
    starts, found = [0, 0], [[], []]
    for lengths in schedule:
        chunk = np.full((BATCH, 20, FEATURES), padding, np.float32)
        for row, count in enumerate(lengths):
            chunk[row, :count] = x[row, starts[row] : starts[row] + count]
            starts[row] += count
        out = step(layer, chunk, jnp.asarray(lengths, jnp.int32))
        for row, count in enumerate(lengths):
            found[row].append(out[row, :count])
    assert layer.cache.get_value().length.tolist() == starts
    return [np.concatenate(row) for row in found]


@pytest.mark.slow
def test_ragged_rows_are_those_alone():
    both = feed([(20, 13), (20, 0), (0, 7)], padding=9.0)
    np.testing.assert_allclose(both[0], feed([(20, 0), (20, 0)], padding=0.0)[0], atol=2e-6)
    np.testing.assert_allclose(both[1], feed([(0, 13), (0, 7)], padding=0.0)[1], atol=2e-6)


@pytest.fixture(scope="module")
def stepped():
    """Outputs of a prompt of 20 tokens and 20 single tokens."""
    return in_chunks(make(compressed(3), rope_base=1e4), inputs(), [20] + [1] * 20)


@pytest.mark.slow
def test_a_loop_without_state_in_a_donated_cache(stepped):
    """`extend` in a `lax.scan` and a `lax.while_loop` gives what calls with state give, and copies nothing."""
    x = inputs()
    layer = CompressedAttention(
        HEADS, FEATURES, 64, num_kv_heads=2, cache_spec=compressed(3), rope_base=1e4, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(layer)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(state, cache, x):
        pure = nnx.merge(graphdef, state)
        first, cache = pure.extend(x[:, :20], cache)

        def step(cache, token):
            out, cache = pure.extend(token[:, None], cache)
            return cache, out[:, 0]

        cache, middle = lax.scan(step, cache, x[:, 20:30].swapaxes(0, 1))

        def again(carry):
            i, cache, outs = carry
            out, cache = pure.extend(lax.dynamic_slice_in_dim(x, i, 1, axis=1), cache)
            return i + 1, cache, lax.dynamic_update_slice_in_dim(outs, out, i - 30, axis=1)

        start = (jnp.int32(30), cache, jnp.zeros((BATCH, 10, FEATURES)))
        _, cache, last = lax.while_loop(lambda carry: carry[0] < TOKENS, again, start)
        return jnp.concatenate([first, middle.swapaxes(0, 1), last], axis=1), cache

    cache = layer.make_cache((BATCH, TOKENS, FEATURES))
    out, new = run(state, cache, x)
    np.testing.assert_allclose(out, stepped, atol=2e-5)
    assert new.length.tolist() == [TOKENS] * BATCH
    assert cache.exact_keys.is_deleted() and cache.pages.keys.packed.is_deleted()


def test_a_loop_with_state_under_nnx(stepped):
    """The module is the carry of `nnx.scan` and `nnx.while_loop` under `nnx.jit`, its cache donated."""
    layer, x = make(compressed(3), rope_base=1e4), inputs()

    @functools.partial(nnx.jit, donate_argnums=0)
    def run(layer, x):
        first = layer(x[:, :20])

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def step(layer, token):
            return layer, layer(token[:, None])[:, 0]

        layer, middle = step(layer, x[:, 20:30].swapaxes(0, 1))

        def again(carry):
            layer, i, outs = carry
            out = layer(lax.dynamic_slice_in_dim(x, i, 1, axis=1))
            return layer, i + 1, lax.dynamic_update_slice_in_dim(outs, out, i - 30, axis=1)

        start = (layer, jnp.int32(30), jnp.zeros((BATCH, 10, FEATURES)))
        _, _, last = nnx.while_loop(lambda carry: carry[1] < TOKENS, again, start)
        return jnp.concatenate([first, middle.swapaxes(0, 1), last], axis=1)

    before = layer.cache.get_value()
    np.testing.assert_allclose(run(layer, x), stepped, atol=2e-5)
    assert layer.cache.get_value().length.tolist() == [TOKENS] * BATCH
    assert before.exact_keys.is_deleted()


class Model(nnx.Module):
    """A small language model, whose layers have either attention."""

    def __init__(self, attention, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.layers = nnx.List(
            [attention(HEADS, FEATURES, 64, num_kv_heads=2, decode=True, rngs=rngs) for _ in range(2)]
        )
        self.norms = nnx.List([nnx.RMSNorm(FEATURES, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(FEATURES, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + 2 * layer(norm(x))
        return self.head(x)


@pytest.fixture(scope="module")
def models():
    """A model with the attention of Flax, and one with ours in 8 bits, of the same weights."""
    ours = functools.partial(CompressedAttention, cache_spec=compressed(8))
    return [Model(attention, rngs=nnx.Rngs(9)) for attention in (nnx.MultiHeadAttention, ours)]


def run(model, prompt, count):
    """Logits and tokens of a prompt that is given and of `count` greedy tokens after it, one by one."""
    for layer in model.layers:
        layer.init_cache((BATCH, 200, FEATURES))
    step = nnx.jit(lambda model, token: model(token)[:, -1])
    logits, tokens = [], []
    for i in range(prompt.shape[1] + count):
        tokens.append(prompt[:, i : i + 1] if i < prompt.shape[1] else logits[-1].argmax(-1)[:, None])
        logits.append(step(model, tokens[-1]))
    return np.stack(logits, axis=1), np.concatenate(tokens, axis=1)


def gaps(logits):
    """How far the most likely token is ahead of the next."""
    top = np.sort(logits, axis=-1)
    return top[..., -1] - top[..., -2]


@pytest.mark.slow
def test_greedy_tokens_of_8_bits_are_those_of_flax(models):
    theirs, ours = models
    prompt = jax.random.randint(jax.random.key(0), (BATCH, 30), 0, VOCABULARY)
    logits, want = run(theirs, prompt, 60)
    assert gaps(logits[:, 30:]).min() > 0.2  # no token is a close call
    np.testing.assert_array_equal(run(ours, prompt, 60)[1], want)
    cache = ours.layers[0].cache.get_value()
    dense = sum(x[...].nbytes for x in (theirs.layers[0].cached_key, theirs.layers[0].cached_value))
    assert cache.compressed.tolist() == [80, 80] and cache.nbytes < 0.5 * dense


def test_most_likely_tokens_of_8_bits_are_those_of_flax(models):
    tokens = jax.random.randint(jax.random.key(1), (BATCH, 90), 0, VOCABULARY)
    want, found = (run(model, tokens, 0)[0] for model in models)
    error = np.abs(found - want).max()
    assert error < 0.03 * want.std()
    clear = gaps(want) > 2 * error
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found.argmax(-1)[clear], want.argmax(-1)[clear])


def test_the_view_of_flax_makes_the_cache():
    layer = CompressedAttention(HEADS, FEATURES, 64, rngs=nnx.Rngs(0))
    view = nnx.view(layer, decode=True, batch_size=BATCH, max_length=TOKENS)
    assert view(inputs(3)).shape == (BATCH, 3, FEATURES)
    assert view.cache.get_value().length.tolist() == [3, 3] and layer.cache is None
    with pytest.raises(ValueError, match="batch_size and max_length"):
        nnx.view(layer, decode=True, batch_size=BATCH)


def test_the_default_is_the_recommended_cache():
    layer = make()
    want = tq.CacheSpec.recommended(2, 16, TOKENS)
    assert layer.cache.get_value().spec == dataclasses.replace(want, max_tokens=TOKENS)
    layer.init_cache((1, 64, FEATURES), jnp.float16, seed=3)
    assert layer.cache.get_value().spec.dtype == "float16" and layer.cache.get_value().rows == 1


@pytest.mark.slow
def test_a_sequence_without_room():
    layer = make(compressed(4))
    layer(inputs(39))
    with pytest.raises(ValueError, match="at most max_tokens=40"):
        layer(inputs(2))
    out = nnx.jit(lambda layer, x: layer(x, lengths=jnp.asarray([2, 1], jnp.int32)))(layer, inputs(2))
    assert np.isnan(out[0]).all() and np.isfinite(out[1, 0]).all()
    assert layer.cache.get_value().length.tolist() == [39, 40]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs_k": jnp.ones((BATCH, 3, FEATURES))}, NotImplementedError, "another inputs_k"),
        ({"mask": jnp.ones((BATCH, 1, 1, 3), bool)}, NotImplementedError, "mask=None, got \\(2, 1, 1, 3\\)"),
        ({"sow_weights": True}, NotImplementedError, "sow_weights=False, got True"),
        ({"input_positions": jnp.zeros((BATCH, 1))}, NotImplementedError, "input_positions=None"),
        ({"bias": 1}, TypeError, "bias"),
        ({"lengths": jnp.ones(BATCH, jnp.int32), "decode": False}, ValueError, "lengths=None"),
    ],
)
def test_calls_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make()(inputs(1), **options)


def test_dropout_is_refused_with_a_cache():
    layer = make(dropout_rate=0.1)
    with pytest.raises(NotImplementedError, match=r"deterministic=True with dropout_rate=0.1, got None"):
        layer(inputs(1))
    assert layer(inputs(1), deterministic=True).shape == (BATCH, 1, FEATURES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_fn": jax.nn.dot_product_attention}, NotImplementedError, "attention_fn="),
        ({"in_kv_features": 20}, NotImplementedError, "in_kv_features=20"),
        ({"cache_spec": full(3)}, ValueError, r"\(4, 16\), got \(3, 16\)"),
        ({"cache_spec": dataclasses.replace(full(), sliding_window=8)}, NotImplementedError, "window=None, got 8"),
        ({"rope_base": 0.0}, ValueError, "above 0, got 0.0"),
        ({"rope_base": 1e4, "qkv_features": 60}, ValueError, "even head_dim"),
    ],
)
def test_modules_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        CompressedAttention(**({"num_heads": HEADS, "in_features": FEATURES, "qkv_features": 64} | options),
                            rngs=nnx.Rngs(0))  # fmt: skip


def test_wrong_use():
    layer = CompressedAttention(HEADS, FEATURES, 64, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="decode as an argument"):
        layer(inputs(1))
    with pytest.raises(ValueError, match="expected init_cache"):
        layer(inputs(1), decode=True)
    with pytest.raises(NotImplementedError, match="one batch axis, got 2"):
        layer.init_cache((2, 2, TOKENS, FEATURES))
    with pytest.raises(ValueError, match="expected input_shape"):
        layer.init_cache((2, TOKENS, 3))
    with pytest.raises(ValueError, match="expected inputs of shape"):
        layer.extend(inputs(1), layer.make_cache((BATCH + 1, TOKENS, FEATURES)))
