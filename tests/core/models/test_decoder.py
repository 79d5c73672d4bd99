"""The decoder over a cache against the decoder without a cache. test_oracle.py compares with transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tq_jax as tq
from tests.core.models.in_place import check_in_place
from tq_jax.models import Decoder, Sampling
from tq_jax.models.generate import decode_loop


@functools.partial(jax.jit, donate_argnums=2)
def extend(decoder, tokens, cache, lengths):
    hidden, cache = decoder.extend(tokens, cache, lengths=lengths)
    return decoder.logits(hidden), cache


@functools.partial(jax.jit, donate_argnums=2)
def prefill(decoder, tokens, cache, lengths):
    hidden, cache = decoder.prefill(tokens, cache, lengths=lengths)
    return decoder.logits(hidden), cache


@jax.jit
def forward(decoder, tokens):
    return decoder.logits(decoder.forward(tokens))


def test_token_by_token_equals_one_pass(tiny, exact_spec):
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, tiny.config.vocab_size)
    expected = forward(tiny, tokens)
    cache, logits = tiny.init_cache(exact_spec, batch=2), []
    for t in range(tokens.shape[1]):
        step, cache = extend(tiny, tokens[:, t : t + 1], cache, jnp.ones(2, jnp.int32))
        logits.append(step)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_local_layers_over_a_compressed_cache(hybrid, packed_spec):
    """A sliding window of 12 lies partly in the ring of 8 and partly in the pages. test_families.py has exact ones."""
    quantizer = tq.QuantizerSpec(dim=16, bits=8)
    spec = dataclasses.replace(packed_spec, key=quantizer, value=quantizer)
    tokens = jax.random.randint(jax.random.key(2), (2, 40), 0, hybrid.config.vocab_size)
    expected = forward(hybrid, tokens)[:, 36:]
    _, cache = prefill(hybrid, tokens[:, :36], hybrid.init_cache(spec, batch=2), jnp.full(2, 36, jnp.int32))
    logits, cache = extend(hybrid, tokens[:, 36:], cache, jnp.full(2, 4, jnp.int32))
    error = float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected))
    assert 1e-5 < error < 0.01, error
    assert cache.compressed.tolist() == [40 - 8 - 4] * 6


def test_local_layers_forget(hybrid):
    config = dataclasses.replace(hybrid.config, sliding_window=4, local_layers=())
    local = Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(3), (1, 30), 0, config.vocab_size)
    other = tokens.at[:, :8].set(5)
    found, changed = forward(local, tokens), forward(local, other)
    # Three layers, each with a window of 4, reach 9 tokens back.
    np.testing.assert_array_equal(found[:, 17:], changed[:, 17:])
    assert not np.array_equal(found[:, 16], changed[:, 16])


def test_local_layers_in_half_precision(hybrid):
    decoder = Decoder(hybrid.config, dtype="bfloat16", rngs=nnx.Rngs(0))
    hidden = jax.jit(lambda decoder, tokens: decoder.forward(tokens))(decoder, jnp.arange(20)[None])
    assert hidden.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(hidden).all())


def test_unknown_families_are_refused(tiny):
    with pytest.raises(NotImplementedError, match="architecture 'mamba': supported are"):
        Decoder(dataclasses.replace(tiny.config, architecture="mamba"), rngs=nnx.Rngs(0))


def test_chunks_equal_one_pass(tiny, exact_spec):
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, tiny.config.vocab_size)
    expected = forward(tiny, tokens)
    full = jnp.full(2, 8, jnp.int32)
    first, cache = prefill(tiny, tokens[:, :8], tiny.init_cache(exact_spec, batch=2), full)
    second, cache = extend(tiny, tokens[:, 8:16], cache, full)
    third, cache = extend(tiny, tokens[:, 16:], cache, full)
    np.testing.assert_allclose(jnp.concatenate([first, second, third], axis=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.length.tolist() == [24] * 6


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["exact", "packed"])
def test_ragged_batch_equals_single_runs(tiny, exact_spec, packed_spec, prompts, kind):
    spec = exact_spec if kind == "exact" else packed_spec
    tokens, lengths = prompts
    more = jnp.array([3, 1, 2], jnp.int32)
    together, cache = prefill(tiny, tokens, tiny.init_cache(spec, batch=3), lengths)
    following, cache = extend(tiny, tokens[:, :3], cache, more)
    for i, (length, count) in enumerate(zip(lengths.tolist(), more.tolist(), strict=True)):
        row = slice(i, i + 1)
        alone, single = prefill(tiny, tokens[row], tiny.init_cache(spec, batch=1), lengths[row])
        after, _ = extend(tiny, tokens[row, :3], single, more[row])
        np.testing.assert_allclose(together[i, :length], alone[0, :length], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(following[i, :count], after[0, :count], rtol=1e-3, atol=1e-3)


def test_what_padding_holds_does_not_matter(tiny, exact_spec, prompts):
    tokens, lengths = prompts
    padding = jnp.arange(tokens.shape[1])[None, :] >= lengths[:, None]
    one, cache = prefill(tiny, tokens, tiny.init_cache(exact_spec, batch=3), lengths)
    two, other = prefill(tiny, jnp.where(padding, 7, tokens), tiny.init_cache(exact_spec, batch=3), lengths)
    np.testing.assert_array_equal(cache.exact_keys, other.exact_keys)
    np.testing.assert_array_equal(jnp.where(padding[..., None], 0, one), jnp.where(padding[..., None], 0, two))


def test_a_row_of_zero_length_stays_as_it_was(tiny, packed_spec, prompts):
    tokens, lengths = prompts
    _, cache = prefill(tiny, tokens, tiny.init_cache(packed_spec, batch=3), lengths)
    before = np.asarray(cache.length)
    logits, cache = extend(tiny, tokens[:, :1], cache, jnp.array([1, 0, 0], jnp.int32))
    assert (np.asarray(cache.length) - before).tolist() == [1, 0, 0] * tiny.config.num_layers
    assert bool(jnp.isfinite(logits).all())


def test_prefill_is_exact_and_a_compressed_cache_stays_close(tiny, packed_spec, prompts):
    tokens, lengths = prompts
    expected = forward(tiny, jnp.concatenate([tokens, tokens[:, :1]], axis=1))
    logits, cache = prefill(tiny, tokens, tiny.init_cache(packed_spec, batch=3), lengths)
    np.testing.assert_allclose(logits[0], expected[0, :23], rtol=1e-4, atol=1e-4)
    last, cache = extend(tiny, tokens[:, :1], cache, jnp.ones(3, jnp.int32))
    error = jnp.linalg.norm(last[0, 0] - expected[0, 23]) / jnp.linalg.norm(expected[0, 23])
    assert 1e-5 < float(error) < 0.1
    assert cache.compressed.tolist() == [24 - 8 - 4, 0, 0] * tiny.config.num_layers


def test_sequence_i_of_layer_l_is_row_l_b_plus_i(tiny, exact_spec, prompts):
    tokens, lengths = prompts
    _, cache = prefill(tiny, tokens, tiny.init_cache(exact_spec, batch=3), lengths)
    assert cache.length.tolist() == lengths.tolist() * tiny.config.num_layers
    _, alone = prefill(tiny, tokens[:1], tiny.init_cache(exact_spec, batch=1), lengths[:1])
    for layer in range(tiny.config.num_layers):
        np.testing.assert_allclose(cache.exact_keys[layer * 3], alone.exact_keys[layer], rtol=1e-4, atol=1e-5)


def test_half_precision_and_a_tied_head(tiny, exact_spec):
    decoder = Decoder(dataclasses.replace(tiny.config, tied_head=True), dtype="bfloat16", rngs=nnx.Rngs(0))
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    logits, cache = prefill(decoder, tokens, decoder.init_cache(exact_spec, batch=1), jnp.array([20], jnp.int32))
    assert logits.dtype == jnp.float32
    logits, _ = extend(decoder, tokens[:, :1], cache, jnp.ones(1, jnp.int32))
    assert bool(jnp.isfinite(logits).all())


def test_refuses_a_cache_of_another_shape(tiny, exact_spec):
    tokens = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"expected 6 rows \(3 layers x 2 sequences\), got 3"):
        tiny.extend(tokens, tiny.init_cache(exact_spec, batch=1))
    with pytest.raises(ValueError, match="batch: expected at least 1 sequence, got 0"):
        tiny.init_cache(exact_spec, batch=0)
    other = tq.CacheSpec.full_precision(num_kv_heads=3, head_dim=16, max_tokens=8)
    with pytest.raises(ValueError, match=r"expected \(2, 16\), got \(3, 16\)"):
        tiny.init_cache(other, batch=1)


def lower(decoder, spec, *, batch, loop=False):
    """A lowered step of decoding, or the lowered loop of steps. The cache is passed as flat arrays.

    Lowering fills pytrees with placeholders, which the shape checks of the tests would refuse.
    """
    leaves, tree = jax.tree.flatten(decoder.init_cache(spec, batch=batch))

    def step(decoder, tokens, leaves):
        cache = jax.tree.unflatten(tree, leaves)
        if not loop:
            hidden, cache = decoder.extend(tokens[:, None], cache, lengths=jnp.ones(batch, jnp.int32))
            return decoder.logits(hidden), jax.tree.leaves(cache)
        keys, stop = jax.random.split(jax.random.key(0), batch), jnp.array([1], jnp.int32)
        options = {"sampling": Sampling(), "max_new_tokens": 5, "implementation": "auto"}
        out, _, cache = decode_loop.__wrapped__(decoder, tokens, cache, keys, stop, **options)
        return out, jax.tree.leaves(cache)

    return jax.jit(step, donate_argnums=2).lower(decoder, jnp.zeros(batch, jnp.int32), leaves)


@pytest.mark.sampled
@pytest.mark.parametrize("loop", [False, True], ids=["step", "loop"])
@pytest.mark.parametrize("kind", ["exact", "packed", "hybrid"])
def test_decoding_updates_the_cache_in_place(tiny, hybrid, exact_spec, packed_spec, kind, loop):
    spec, decoder = exact_spec if kind == "exact" else packed_spec, tiny
    if kind == "hybrid":
        # Two layers of each kind: a cache has other shapes than the rows of a layer.
        config = dataclasses.replace(hybrid.config, num_layers=4, local_layers=(True, False, True, False))
        decoder = Decoder(config, rngs=nnx.Rngs(0))
    cache = decoder.init_cache(spec, batch=2)
    compiled = lower(decoder, spec, batch=2, loop=loop).compile()
    assert "input_output_alias" in compiled.as_text()
    check_in_place(compiled, cache)


@pytest.mark.parametrize("runs", [1, 3])
def test_program_size_does_not_grow_with_the_length_of_runs(tiny, hybrid, exact_spec, runs):
    def instructions(length: int) -> int:
        config = dataclasses.replace(tiny.config, num_layers=length)
        if runs == 3:
            pattern = (True,) * length + (False,) * length + (True,) * length
            config = dataclasses.replace(hybrid.config, num_layers=3 * length, local_layers=pattern)
        decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), unroll=False))
        assert len(decoder.blocks) == runs
        return len(lower(decoder, exact_spec, batch=1).as_text().splitlines())

    assert instructions(2) == instructions(5)


@pytest.mark.slow
def test_layers_alone_compute_what_runs_compute(hybrid, packed_spec):
    runs = Decoder(dataclasses.replace(hybrid.config, local_layers=()), rngs=nnx.Rngs(0), unroll=False)
    assert [run.count for run in runs.runs] == [hybrid.config.num_layers]
    local = Decoder(runs.config, rngs=nnx.Rngs(1), unroll=True)
    for index, blocks in enumerate(local.blocks):
        nnx.update(blocks, jax.tree.map(lambda x, i=index: x[i : i + 1], nnx.state(runs.blocks[0])))
    for part in ("embedding", "norm", "head"):
        nnx.update(getattr(local, part), nnx.state(getattr(runs, part)))
    tokens = jax.random.randint(jax.random.key(0), (2, 40), 0, runs.config.vocab_size)
    np.testing.assert_allclose(forward(local, tokens), forward(runs, tokens), rtol=1e-4, atol=1e-5)
    caches = []
    for decoder in (local, runs):
        _, cache = prefill(
            decoder, tokens[:, :39], decoder.init_cache(packed_spec, batch=2), jnp.full(2, 39, jnp.int32)
        )
        logits, cache = extend(decoder, tokens[:, 39:], cache, jnp.ones(2, jnp.int32))
        caches.append((logits, cache.exact_keys, cache.length))
    for one, other in zip(*caches, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
