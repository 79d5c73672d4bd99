"""Decoders with local layers, whose caches keep one window, against caches with every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tq_jax as tq
from tq_jax.models import Decoder, LayerCaches, generate, generate_many
from tq_jax.models.layer_caches import layer_of, map_caches, parts_of, with_layer

NEW = 20


@pytest.fixture(scope="module")
def mistral(tiny) -> Decoder:
    """All layers are local."""
    return Decoder(dataclasses.replace(tiny.config, sliding_window=12), rngs=nnx.Rngs(0))


@pytest.fixture(params=["mistral", "hybrid"])
def decoder(request) -> Decoder:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["exact_spec", "packed_spec"])
def spec(request) -> tq.CacheSpec:
    return dataclasses.replace(request.getfixturevalue(request.param), dtype="float32")


@pytest.fixture(scope="module")
def long_prompts():
    """Right-padded prompts of 50 and 33 tokens, several windows long."""
    tokens = np.random.default_rng(0).integers(0, 300, (2, 50), dtype=np.int32)
    return jnp.asarray(tokens), jnp.asarray([50, 33], jnp.int32)


@pytest.mark.sampled
def test_tokens_are_those_of_caches_with_every_token(decoder, spec, long_prompts):
    tokens, lengths = long_prompts
    whole = tq.init_cache(spec, batch=decoder.config.num_layers * 2)
    for chunk in (50, 23):
        options = dict(max_new_tokens=NEW, prompt_chunk=chunk)
        want = generate(decoder, tokens, lengths, cache=whole, **options)
        found = generate(decoder, tokens, lengths, cache=decoder.init_cache(spec, batch=2), **options)
        np.testing.assert_array_equal(found.tokens, want.tokens)
        for name in ("length", "overflow"):
            np.testing.assert_array_equal(getattr(found.cache, name), getattr(want.cache, name))
    fresh = generate(decoder, tokens, lengths, cache_spec=spec, max_new_tokens=NEW)
    np.testing.assert_array_equal(fresh.tokens, generate_from_exact(decoder, tokens, lengths, spec))
    prompts = [row[:n].tolist() for row, n in zip(np.asarray(tokens), lengths.tolist(), strict=True)]
    many = generate_many(decoder, prompts, cache_spec=spec, max_new_tokens=NEW, rows=1)
    assert [one.tokens for one in sorted(many, key=lambda one: one.index)] == fresh.sequences()


def generate_from_exact(decoder, tokens, lengths, spec):
    """Greedy tokens after an exact prompt, over a cache with every token."""
    cache = tq.init_cache(spec, batch=decoder.config.num_layers * tokens.shape[0])

    @functools.partial(jax.jit, static_argnames="exact")
    def step(decoder, tokens, cache, lengths, *, exact=False):
        hidden, cache = (decoder.prefill if exact else decoder.extend)(tokens, cache, lengths=lengths)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        return jnp.argmax(decoder.logits(last)[:, 0], axis=-1).astype(jnp.int32), cache

    token, cache = step(decoder, tokens, cache, lengths, exact=True)
    found = [token]
    for _ in range(NEW - 1):
        token, cache = step(decoder, token[:, None], cache, jnp.ones_like(lengths))
        found.append(token)
    return jnp.stack(found, axis=1)


def test_bytes_of_local_layers_follow_from_the_window(mistral, hybrid, exact_spec, packed_spec):
    for spec in (exact_spec, packed_spec):
        long = dataclasses.replace(spec, max_tokens=4096, window=spec.window if spec.compressed else 4096)
        cache = mistral.init_cache(long, batch=2)
        assert isinstance(cache, tq.Cache)
        assert cache.nbytes == mistral.init_cache(dataclasses.replace(long, max_tokens=256), batch=2).nbytes
        local, whole = hybrid.init_cache(long, batch=2).caches
        assert local.nbytes == 2 / 3 * (cache.nbytes - quantizer_bytes(cache)) + quantizer_bytes(cache)
        assert (local.rows, whole.rows) == (4, 2)
        assert whole.nbytes == tq.init_cache(long, batch=2).nbytes
    # 11 tokens before a query: 8 in the ring, 3 on a page, and one page that fills.
    assert (local.spec.ring, local.spec.pages_per_row) == (8, 2)


def quantizer_bytes(cache):
    return sum(x.nbytes for x in jax.tree.leaves((cache.key_quantizer, cache.value_quantizer)))


def test_rows_are_those_of_one_cache(hybrid, packed_spec):
    cache = hybrid.init_cache(packed_spec, batch=2)
    assert isinstance(cache, LayerCaches)
    assert (cache.rows, cache.batch, cache.spec) == (6, 2, packed_spec)
    marks = jnp.arange(6, dtype=jnp.int32)
    marked = map_caches(lambda one, mark: dataclasses.replace(one, length=mark), cache, marks)
    assert [one.length.tolist() for one in parts_of(marked)] == [[0, 1, 4, 5], [2, 3]]
    assert marked.length.tolist() == marks.tolist()
    own, rows = layer_of(marked, jnp.array([4, 5], jnp.int32), window=12)
    assert own.length[rows].tolist() == [4, 5]
    changed = with_layer(marked, dataclasses.replace(own, length=own.length + 10), window=12)
    assert changed.length.tolist() == [10, 11, 2, 3, 14, 15]
    larger = map_caches(functools.partial(tq.resize, max_tokens=256), cache)
    assert [one.spec.max_tokens for one in parts_of(larger)] == [256, 256]


@pytest.mark.slow
def test_caches_that_layers_cannot_use(tiny, mistral, hybrid, packed_spec, tmp_path, unchecked_shapes):
    local = dataclasses.replace(packed_spec, sliding_window=12)
    with pytest.raises(ValueError, match=r"sliding_window: expected None .*, got 12"):
        hybrid.init_cache(local, batch=1)
    for decoder in (tiny, hybrid):
        with pytest.raises(ValueError, match=r"expected layers that keep the tokens they see, .*, got \(12, 12, 12\)"):
            decoder.require_rows(tq.init_cache(local, batch=3), batch=1)
    mistral.require_rows(tq.init_cache(local, batch=3), batch=1)
    with pytest.raises(ValueError, match="expected layers that keep the tokens they see"):
        tiny.require_rows(hybrid.init_cache(packed_spec, batch=1), batch=1)
    with pytest.raises(ValueError, match=r"20 appended queries with sliding_window=12"):
        hybrid.extend(jnp.zeros((1, 20), jnp.int32), hybrid.init_cache(packed_spec, batch=1), as_stored=True)
    with pytest.raises(TypeError, match=r"expected a tq_jax.Cache \(a file holds one\), got LayerCaches"):
        tq.save_cache(hybrid.init_cache(packed_spec, batch=1), tmp_path / "cache.safetensors")
