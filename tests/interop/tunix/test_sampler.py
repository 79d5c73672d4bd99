"""The sampler of Tunix over compressed caches, against the same sampler over its own."""

import doctest
import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("tunix") is None:
    pytest.skip("needs google-tunix: make test-tunix", allow_module_level=True)

import jax
import jax.numpy as jnp
from flax import nnx
from tunix_models import CACHE, FAMILIES, Tokenizer, make_model, make_sampler

import interop.tunix.cache
import tq_jax as tq
from interop.tunix import compress

# Tunix uses what JAX and Flax deprecate, and asks models for an init_cache that some of its own do not have.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RAGGED = ["how do you do, what is it", "why?"]
FULL = dict(key=None, value=None, window=CACHE, dtype="float32")
EIGHT = dict(key_bits=8, value_bits=8, window=8, sink_tokens=2, page_size=16, dtype="float32")
RANDOM = dict(temperature=1.0, top_p=0.95, seed=1, forbidden_tokens=[0])  # 0 is padding


def sample(model, prompts=RAGGED, *, pad=0, **options):
    """Tokens and their log-probabilities."""
    sampler = make_sampler(model, pad=pad)
    out = sampler(prompts, **(dict(max_generation_steps=40, return_logprobs=True, eos_tokens=[-1]) | options))
    return np.stack(out.tokens), np.stack(out.logprobs)


def assert_same(found, want, *, atol):
    np.testing.assert_array_equal(found[0], want[0])
    np.testing.assert_allclose(found[1], want[1], atol=atol)


@pytest.fixture(scope="module")
def qwen():
    return make_model("qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_precision_is_what_tunix_samples(family):
    """Tunix counts the sliding window of Gemma 2 from the padding, so that it is compared on prompts without any."""
    model = make_model(family)
    prompts = [letter * 3 + "ow do you do" for letter in "ab"] if family == "gemma2" else RAGGED
    want = sample(model, prompts, **RANDOM)
    assert len(np.unique(want[0])) > 20
    assert_same(sample(compress(model, **FULL), prompts, **RANDOM), want, atol=2e-5)


def test_8_bits_sample_the_tokens_of_tunix(qwen):
    assert_same(sample(compress(qwen, **EIGHT)), sample(qwen), atol=0.05)


def exact(model, prompt, tokens, forbidden):
    """Log-probabilities of tokens after a prompt, by the model without a cache."""
    ids = jnp.asarray([[1, *Tokenizer().encode(prompt), *tokens.tolist()]], jnp.int32)
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    logits = model(ids, positions, None, jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool)))[0]
    logits = logits[0].at[:, forbidden].set(-jnp.inf)
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(-len(tokens) - 1, -1), tokens]


@pytest.mark.parametrize(
    ("family", "options"), [("qwen3", {"beam_size": 3}), ("gemma3", RANDOM)], ids=["beams", "top-p"]
)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")  # beams change their shapes
def test_8_bits_of_what_is_sampled(family, options):
    """A token that is close to another may differ from that of Tunix; its log-probability is that of the model."""
    model = make_model(family)
    tokens, found = sample(compress(model, **EIGHT), **options)
    for prompt, row, logs in zip(RAGGED, tokens, found, strict=True):
        error = np.abs(logs - exact(model, prompt, row, jnp.asarray(options.get("forbidden_tokens", []), jnp.int32)))
        assert error.max() < 0.15 and error.mean() < 0.02


def test_a_padding_token_that_is_sampled_is_not_stored(qwen):
    """Tunix hides it from all later tokens."""
    options = RANDOM | dict(forbidden_tokens=None)
    tokens = sample(qwen, **options)[0]
    prompt = {3 + ord(letter) % 58 for text in RAGGED for letter in text}
    pad = next(int(token) for token in tokens[0, :20] if token not in prompt | {1})
    want = sample(qwen, pad=pad, **options)
    assert (want[0][:, :-1] == pad).any()
    assert_same(sample(compress(qwen, **FULL), pad=pad, **options), want, atol=2e-5)


def test_the_cache_is_smaller_and_donated(qwen):
    model = compress(qwen, **EIGHT)
    sampler = make_sampler(model)
    ids = jnp.asarray([[0, 0, 1, 5], [1, 5, 6, 7]], jnp.int32)
    state = sampler.init_sample_state(
        ids, total_sampling_steps=20, include_logits=False, forbidden_token_ids=None, temperature=0.0, top_p=None,
        top_k=None, seed=jax.random.key(0), beam_size=None,
    )  # fmt: skip
    sampler.eos_ids = jnp.asarray([-1])  # a call of the sampler sets them
    weights = sampler.model_def_and_state()[1]
    prefilled = sampler._compiled_prefill_fn(weights, state, None, echo=False)
    done = sampler._compiled_decode_fn(weights, prefilled)
    for before in (state, prefilled):
        assert before.cache["layer_0"].arrays["pages"].keys.packed.is_deleted()
    layer = done.cache["layer_1"]
    assert layer.to_cache().length.tolist() == [18, 20] and layer.end_index.tolist() == [20, 20]
    dense = qwen.init_cache(2, CACHE, jnp.float32)["layer_0"]
    assert layer.nbytes < 0.5 * sum(x.nbytes for x in jax.tree.leaves(dense))


def test_weights_of_a_trainer(qwen):
    """A sampler takes new weights, and gives what a new sampler of them gives."""
    other = make_model("qwen3", seed=5)
    sampler = make_sampler(compress(qwen, **FULL))
    sampler.transformer_state = nnx.variables(other)
    out = sampler(RAGGED, max_generation_steps=10, eos_tokens=[-1])
    np.testing.assert_array_equal(np.stack(out.tokens), sample(other, max_generation_steps=10)[0])


def chunk(tokens=6):
    """Arguments of a call of a model: tokens, positions, and a causal mask."""
    ids = jnp.asarray(np.arange(2 * tokens).reshape(2, tokens) % 50 + 3, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), ids.shape)
    return ids, positions, jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (2, tokens, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_without_a_cache_are_those_of_tunix(family):
    model, (ids, positions, mask) = make_model(family), chunk()
    new = compress(model)
    found, cache = new(ids, positions, None, mask)
    np.testing.assert_array_equal(found, model(ids, positions, None, mask)[0])
    assert cache is None and not hasattr(model, "compression")
    theirs, ours = (jax.tree.leaves(nnx.state(each, nnx.Param)) for each in (model, new))
    assert all(x is y for x, y in zip(theirs, ours, strict=True))


def test_masks_that_are_not_causal(qwen):
    model, (ids, positions, mask) = compress(qwen, **EIGHT), chunk()
    cache = model.init_cache(2, CACHE, jnp.float32)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, CACHE - 6)))
    causal = model(ids, positions, cache, mask)[0]
    assert np.isfinite(causal).all()
    for other in (mask.at[1, 2, 4].set(True), mask.at[1, 5, 0].set(False)):
        with pytest.raises(NotImplementedError, match=r"sequences \[1\]"):
            model(ids, positions, cache, other)
        traced = jax.jit(lambda mask: model(ids, positions, cache, mask)[0])(other)
        np.testing.assert_allclose(traced[0], causal[0], atol=1e-4)
        assert np.isnan(traced[1]).all()
    with pytest.raises(NotImplementedError, match=r"segment_ids=None with a cache, got an array of shape \(2, 6\)"):
        model(ids, positions, cache, mask, segment_ids=jnp.ones((2, 6), jnp.int32))


def test_what_is_refused(qwen):
    with pytest.raises(NotImplementedError, match="got Linear"):
        compress(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match="got CompressedQwen3"):
        compress(compress(qwen))
    with pytest.raises(ValueError, match="got \\['max_tokens'\\]"):
        compress(qwen, max_tokens=3)
    with pytest.raises(ValueError, match="got \\['sliding_window'\\]"):
        compress(qwen, sliding_window=64)
    with pytest.raises(TypeError, match="windows"):
        compress(qwen, windows=3)
    with pytest.raises(NotImplementedError, match="7"):
        compress(qwen, key_bits=7)
    seeing = make_model("gemma3")
    seeing.config.vision_config = object()
    with pytest.raises(NotImplementedError, match="vision_config=None"):
        compress(seeing)
    spread = make_model("qwen3")
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec())
    nnx.update(spread, jax.device_put(nnx.state(spread, nnx.Param), everywhere))
    with pytest.raises(NotImplementedError, match="parameters on 2"):
        compress(spread)


def test_models_that_are_equal_compile_once(qwen):
    one, other = compress(qwen), compress(qwen)
    assert type(one) is type(other) and nnx.graphdef(one) == nnx.graphdef(other)
    assert one.init_cache(1, 300, jnp.bfloat16)["layer_0"].spec == tq.CacheSpec.recommended(2, 32, 300)


def test_examples():
    assert doctest.testmod(interop.tunix.cache).attempted == 3 and doctest.testmod(interop.tunix.cache).failed == 0
