"""Prompts of which only the last token is wanted: the last layer goes on with it alone, and nothing else changes."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tq_jax as tq
from tq_jax.models import Decoder, causal_attention

LENGTHS = jnp.array([40, 1, 27], jnp.int32)
MORE = jnp.array([0, 16, 11], jnp.int32)


@pytest.fixture(scope="module")
def llama(tiny) -> Decoder:
    return Decoder(dataclasses.replace(tiny.config, num_layers=2), rngs=nnx.Rngs(0), unroll=True)


@pytest.fixture(scope="module")
def scanned(llama) -> Decoder:
    return Decoder(llama.config, rngs=nnx.Rngs(0), unroll=False)


@pytest.fixture(scope="module")
def mistral(llama) -> Decoder:
    return Decoder(dataclasses.replace(llama.config, sliding_window=12), rngs=nnx.Rngs(0), unroll=True)


@pytest.fixture(scope="module")
def gemma(hybrid) -> Decoder:
    """Its last layer is local."""
    return Decoder(dataclasses.replace(hybrid.config, num_layers=2, local_layers=(False, True)), rngs=nnx.Rngs(0))


@partial(jax.jit, static_argnames="last_only")
def prefill(decoder, tokens, cache, lengths, *, last_only):
    hidden, cache = decoder.prefill(tokens, cache, lengths=lengths, last_only=last_only)
    return decoder.logits(hidden), cache


@partial(jax.jit, static_argnames=("last_only", "implementation"))
def extend(decoder, tokens, cache, lengths, *, last_only, implementation="auto"):
    how = {"last_only": last_only, "implementation": implementation}
    hidden, cache = decoder.extend(tokens, cache, lengths=lengths, **how)
    return decoder.logits(hidden), cache


def draw_tokens(count: int) -> jax.Array:
    return jax.random.randint(jax.random.key(count), (3, count), 0, 300)


def check_same(whole, last, lengths):
    """Logits of the last tokens are equal to rounding, and so is everything that the caches hold."""
    (logits, cache), (found, own) = whole, last
    assert found.shape == (3, 1, 300)
    for row, length in enumerate(lengths.tolist()):
        if length:
            want = logits[row, length - 1]
            np.testing.assert_allclose(found[row, 0], want, atol=1e-5 * float(jnp.abs(want).max()))
            assert int(found[row, 0].argmax()) == int(want.argmax())
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("decoder", "spec"),
    [
        ("llama", "exact_spec"), ("llama", "packed_spec"), ("scanned", "packed_spec"), ("mistral", "packed_spec"),
        ("gemma", "packed_spec"),
    ],
)  # fmt: skip
def test_last_tokens_of_prompts_and_of_chunks(decoder, spec, request):
    """Ragged prompts, then ragged chunks behind them, one of which has no token; packed caches fix statistics."""
    decoder, spec, tokens = request.getfixturevalue(decoder), request.getfixturevalue(spec), draw_tokens(40)
    assert (decoder.runs[-1].count == 1) == (len(decoder.runs) == 2)
    empty = decoder.init_cache(spec, batch=3)
    whole, last = (prefill(decoder, tokens, empty, LENGTHS, last_only=only) for only in (False, True))
    check_same(whole, last, LENGTHS)
    chunk, cache = draw_tokens(16), whole[1]
    whole, last = (extend(decoder, chunk, cache, MORE, last_only=only) for only in (False, True))
    check_same(whole, last, MORE)


@pytest.mark.slow
def test_few_tokens_and_those_without_lengths(llama, exact_spec):
    tokens, cache, few = draw_tokens(12), llama.init_cache(exact_spec, batch=3), jnp.array([3, 2, 0], jnp.int32)
    whole, last = (prefill(llama, tokens, cache, None, last_only=only) for only in (False, True))
    check_same(whole, last, jnp.full(3, 12))
    for count, lengths in ((12, None), (3, few)):
        whole, last = (extend(llama, tokens[:, :count], last[1], lengths, last_only=only) for only in (False, True))
        check_same(whole, last, jnp.full(3, 12) if lengths is None else lengths)
    with pytest.raises(ValueError, match="expected one of as_stored and last_only, got both"):
        llama.extend(tokens, cache, as_stored=True, last_only=True)


@pytest.mark.parametrize("step", [prefill, extend])
def test_the_last_layer_multiplies_one_token_per_sequence(llama, packed_spec, step):
    leaves, tree = jax.tree.flatten(llama.init_cache(packed_spec, batch=3))

    def products(last_only: bool) -> dict[str, list[int]]:
        def run(decoder, tokens, leaves):
            cache = jax.tree.unflatten(tree, leaves)
            return step.__wrapped__(decoder, tokens, cache, LENGTHS, last_only=last_only)[0]

        text = jax.jit(run).lower(llama, draw_tokens(40), leaves).as_text()
        results = re.findall(r"stablehlo.dot_general.*-> tensor<([\dx]+)xf32>", text)
        # Feed-forward, down and output projections, and queries, keys and values together.
        sizes = {"feed-forward": "2x80", "back to dim": "48", "heads": "2x4x16"}
        return {name: [results.count(f"3x{t}x{size}") for t in (40, 1)] for name, size in sizes.items()}

    assert products(False) == {"feed-forward": [2, 0], "back to dim": [4, 0], "heads": [2, 0]}
    assert products(True) == {"feed-forward": [1, 1], "back to dim": [2, 2], "heads": [2, 0]}


@pytest.mark.parametrize("window", [None, 7])
def test_one_query_of_a_prompt(window):
    """The values behind the query may be garbage."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 3, 20, 4, 16))
    key, value, only = key[:, :, :2], value[:, :, :2], jnp.array([19, 0, 9], jnp.int32)
    want = causal_attention(query, key, value, window=window)
    one = jnp.take_along_axis(query, only[:, None, None, None], axis=1)
    garbage = jnp.where((jnp.arange(20)[None] > only[:, None])[:, :, None, None], jnp.nan, value)
    found = causal_attention(one, key, garbage, window=window, only=only)
    np.testing.assert_allclose(found[:, 0], want[jnp.arange(3), only], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="query: expected one token per sequence with only, got 20"):
        causal_attention(query, key, value, only=only)


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("window", [None, 30])
def test_one_query_of_a_chunk_behind_a_cache(implementation, window):
    options = {"max_tokens": 128, "window": 8, "sliding_window": window}
    spec = tq.CacheSpec.recommended(2, 64, **options)
    old, new = jax.random.normal(jax.random.key(1), (2, 3, 50, 2, 64))
    counts, lengths = jnp.array([50, 0, 33], jnp.int32), jnp.array([20, 12, 0], jnp.int32)
    cache = tq.append(tq.init_cache(spec, batch=3), old, old, lengths=counts)
    query, chunk = jax.random.normal(jax.random.key(2), (3, 20, 4, 64)), (new[:, :20], new[:, 20:40])
    how = {"chunk": chunk, "lengths": lengths}
    want = tq.attend(query, cache, implementation="reference", **how)
    only = jnp.maximum(lengths - 1, 0)
    one = jnp.take_along_axis(query, only[:, None, None, None], axis=1)
    found = tq.attend(one, cache, implementation=implementation, only=only, **how)
    error = jnp.linalg.norm(found[:, 0] - want[jnp.arange(3), only]) / jnp.linalg.norm(want[jnp.arange(3), only])
    assert float(error) < (1e-5 if implementation == "reference" else 0.01)
    assert not found[2].any()  # a row without tokens
    for wrong, message in (
        ({"query": query}, "only: expected one query per row, and a chunk, got 20 queries with a chunk"),
        ({"chunk": None}, "only: expected one query per row, and a chunk, got 1 queries without a chunk"),
        ({"only": only + 1}, r"expected only from 0 to 19, got \[20, 12, 1\]"),
    ):
        arguments = {"query": one, "only": only, "chunk": chunk} | wrong
        with pytest.raises(ValueError, match=message):
            tq.attend(arguments.pop("query"), cache, **arguments)
