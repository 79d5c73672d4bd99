import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from tq_jax.models import Sampling, decoder, generate, pad_prompts
from tq_jax.models.decoder import Decoder
from tq_jax.models.generate import decode_loop, prefill_step

NEW = 6


@pytest.fixture(scope="module")
def greedy(tiny, exact_spec, prompts):
    tokens, lengths = prompts
    return generate(tiny, tokens, lengths, cache_spec=exact_spec, max_new_tokens=NEW)


def oracle_loop(decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from one exact pass over all tokens before it."""
    forward = jax.jit(lambda tokens: decoder.logits(decoder.forward(tokens)))
    sequence = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(sequence)] = sequence
        sequence.append(int(forward(jnp.asarray(padded))[0, len(sequence) - 1].argmax()))
    return sequence[len(prompt) :]


@pytest.mark.slow
def test_greedy_equals_the_loop_without_a_cache(tiny, prompts, greedy):
    tokens, lengths = prompts
    for row, length, found in zip(tokens, lengths.tolist(), greedy.sequences(), strict=True):
        assert found == oracle_loop(tiny, row[:length].tolist(), NEW)
    assert greedy.lengths.tolist() == [NEW] * 3
    assert greedy.cache.length.tolist() == (lengths + NEW - 1).tolist() * tiny.config.num_layers


def test_stop_tokens(tiny, exact_spec, prompts, greedy):
    tokens, lengths = prompts
    first, second, third = greedy.sequences()
    stop = (first[2], second[0])
    expected = [row[: next((i for i, t in enumerate(row) if t in stop), NEW - 1) + 1] for row in (first, second, third)]
    out = generate(tiny, tokens, lengths, cache_spec=exact_spec, max_new_tokens=NEW, stop_tokens=stop)
    assert out.sequences() == expected
    assert out.lengths.tolist() == [len(row) for row in expected]
    for row, found in zip(np.asarray(out.tokens), expected, strict=True):
        assert row.tolist() == found + [-1] * (NEW - len(found))
    # Sequences that have stopped append nothing.
    assert out.cache.length[:3].tolist() == (lengths + out.lengths - 1).tolist()


@pytest.mark.parametrize("chunk", [7, 12, 16])
def test_exact_prompts_by_chunks(tiny, exact_spec, prompts, greedy, chunk):
    tokens, lengths = prompts
    options = {"cache_spec": exact_spec, "max_new_tokens": NEW, "prompt_chunk": chunk}
    np.testing.assert_array_equal(generate(tiny, tokens, lengths, **options).tokens, greedy.tokens)
    with pytest.raises(ValueError, match="prompt_chunk: expected at least 1 token, got 0"):
        generate(tiny, tokens, lengths, **(options | {"prompt_chunk": 0}))


def test_prompts_by_chunks_continue_a_cache(tiny, exact_spec, prompts, greedy):
    tokens, lengths = prompts
    first, rest = tokens[:, :1], tokens[:, 1:]
    _, cache = prefill_step(
        tiny, first, jnp.ones_like(lengths), tiny.init_cache(exact_spec, batch=3),
        jax.random.split(jax.random.key(0), 3), sampling=Sampling(),
    )  # fmt: skip
    kept = jax.tree.map(np.asarray, cache)
    rows = jnp.array([0, 2])
    both = jax.tree.map(lambda x: x, cache)
    out = generate(tiny, rest, jnp.maximum(lengths - 1, 1), cache=both, max_new_tokens=NEW, prompt_chunk=5)
    np.testing.assert_array_equal(out.tokens[rows], greedy.tokens[rows])
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, cache))


@pytest.mark.slow
def test_chunks_of_a_prompt_over_a_compressed_cache(tiny, packed_spec):
    """Tokens of a chunk see each other exactly, those before them as the cache holds them: close to one exact pass."""
    tokens = jax.random.randint(jax.random.key(0), (1, 96), 0, tiny.config.vocab_size)
    exact = tiny.logits(tiny.forward(tokens))
    cache, parts = tiny.init_cache(packed_spec, batch=1), []
    for start in range(0, 96, 32):
        hidden, cache = tiny.extend(tokens[:, start : start + 32], cache)
        parts.append(tiny.logits(hidden))
    np.testing.assert_allclose(parts[0], exact[:, :32], rtol=1e-4, atol=1e-4)
    error = jnp.linalg.norm(jnp.concatenate(parts, axis=1) - exact) / jnp.linalg.norm(exact)
    stored, _ = tiny.extend(tokens, tiny.init_cache(packed_spec, batch=1), as_stored=True)
    worse = jnp.linalg.norm(tiny.logits(stored) - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < float(error) < float(worse) < 0.2


def test_compressed_cache(tiny, packed_spec, prompts):
    tokens, lengths = prompts
    one, two = (generate(tiny, tokens, lengths, cache_spec=packed_spec, max_new_tokens=NEW) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert int(one.cache.compressed.max()) == 23 + NEW - 1 - 12


def test_precise_reaches_attend(tiny, exact_spec, prompts, monkeypatch):
    seen, attend = [], decoder.attend_joint

    def spy(*arguments, **options):
        seen.append(options["precise"])
        return attend(*arguments, **options)

    monkeypatch.setattr(decoder, "attend_joint", spy)
    generate(tiny, *prompts, cache_spec=exact_spec, max_new_tokens=2, precise=True)
    assert seen
    assert all(seen)


def test_sampling_is_reproducible(tiny, exact_spec, prompts, greedy):
    tokens, lengths = prompts

    def run(seed: int, sampling: Sampling):
        key = jax.random.key(seed)
        return generate(
            tiny, tokens, lengths, cache_spec=exact_spec, max_new_tokens=NEW, sampling=sampling, key=key
        ).sequences()

    warm = Sampling(temperature=1.5)
    assert run(0, warm) == run(0, warm)
    assert run(0, warm) != run(1, warm)
    assert run(3, Sampling(temperature=1.5, top_k=1)) == greedy.sequences()


def test_one_trace_each(tiny, exact_spec, monkeypatch):
    counts = {"prefill": 0, "extend": 0}

    def counted(name):
        original = getattr(Decoder, name)

        def run(self, *args, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Decoder, name, run)

    counted("prefill")
    counted("extend")
    prefill_step.clear_cache()
    decode_loop.clear_cache()
    for prompt in ([1, 2, 3], list(range(13)), [5]):
        tokens, lengths = pad_prompts([prompt])
        out = generate(tiny, tokens, lengths, cache_spec=exact_spec, max_new_tokens=NEW, stop_tokens=[prompt[0]])
        assert 1 <= len(out.sequences()[0]) <= NEW
    assert counts == {"prefill": 1, "extend": 1}


def test_the_cache_is_donated(tiny, exact_spec):
    cache = tiny.init_cache(exact_spec, batch=1)
    tokens, keys = jnp.array([[1, 2]]), jax.random.split(jax.random.key(0), 1)
    first, filled = prefill_step(tiny, tokens, jnp.array([2]), cache, keys, sampling=Sampling())
    assert cache.exact_keys.is_deleted()
    stop = jnp.zeros(0, jnp.int32)
    options = {"sampling": Sampling(), "max_new_tokens": 2, "implementation": "auto"}
    decode_loop(tiny, first, filled, keys, stop, **options)
    assert filled.exact_keys.is_deleted()


def test_padding_may_exceed_the_cache(tiny):
    spec = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=16, max_tokens=21, dtype="float32")
    prompt = list(range(20))
    tokens, lengths = pad_prompts([prompt])
    assert tokens.shape[1] > spec.max_tokens
    out = generate(tiny, tokens, lengths, cache_spec=spec, max_new_tokens=2)
    assert out.sequences() == [oracle_loop(tiny, prompt, 2)]


def test_exactly_full(tiny, prompts):
    tokens, lengths = prompts
    spec = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=16, max_tokens=23 + 1, dtype="float32")
    out = generate(tiny, tokens, lengths, cache_spec=spec, max_new_tokens=2)
    assert bool((out.tokens >= 0).all())
    with pytest.raises(ValueError, match=r"room for 25 tokens \(prompt 23 \+ 3 new - 1\), got 24"):
        generate(tiny, tokens, lengths, cache_spec=spec, max_new_tokens=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokens": jnp.zeros((0, 4), jnp.int32), "lengths": jnp.zeros(0, jnp.int32)},
            r"with b and t at least 1, got int32 \(0, 4\)",
        ),
        ({"tokens": jnp.zeros((2, 4))}, "tokens: expected integers"),
        ({"lengths": jnp.array([4, 0], jnp.int32)}, r"expected prompts of 1 to 4 tokens, got \[4, 0\]"),
        ({"lengths": jnp.array([4, 5], jnp.int32)}, r"expected prompts of 1 to 4 tokens, got \[4, 5\]"),
        ({"lengths": jnp.array([4], jnp.int32)}, r"lengths: expected integers \[2\]"),
        ({"tokens": jnp.full((2, 4), 300, jnp.int32)}, r"tokens: expected ids in \[0, 300\), got 300 to 300"),
        ({"stop_tokens": [-1]}, r"stop_tokens: expected ids in \[0, 300\)"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 200}, r"cache_spec.max_tokens: expected room for 203 tokens"),
        ({"sampling": Sampling(temperature=1.0)}, "key: expected a random key to sample at temperature 1.0, got None"),
    ],
)
def test_refuses(tiny, exact_spec, change, message):
    arguments = {"tokens": jnp.zeros((2, 4), jnp.int32), "lengths": jnp.array([4, 2], jnp.int32)}
    arguments |= {"cache_spec": exact_spec, "max_new_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        generate(tiny, arguments.pop("tokens"), arguments.pop("lengths"), **arguments)


def test_refuses_more_than_the_models_context(tiny):
    spec = tq.CacheSpec.full_precision(num_kv_heads=2, head_dim=16, max_tokens=1024)
    with pytest.raises(ValueError, match=r"the model's context: expected room for 514 tokens .*, got 512"):
        generate(tiny, jnp.ones((1, 500), jnp.int32), jnp.array([500]), cache_spec=spec, max_new_tokens=15)


def test_padding_shares_shapes():
    assert {pad_prompts([[1] * n])[0].shape[1] for n in range(1, 17)} == {16}
    for n in range(1, 3000, 17):
        padded = pad_prompts([[1] * n])[0].shape[1]
        assert n <= padded <= max(n + 15, 1.25 * n)
    assert len({pad_prompts([[1] * n])[0].shape[1] for n in range(1, 3000)}) < 40
    with pytest.raises(ValueError, match=r"got lengths \[2, 0\]"):
        pad_prompts([[1, 2], []])
    with pytest.raises(ValueError, match=r"got lengths \[\]"):
        pad_prompts([])


def test_goes_on_behind_a_cache(tiny, exact_spec, prompts, greedy):
    """Two calls give the tokens of one call, and the cache between them does not change."""
    tokens, lengths = prompts
    first = generate(tiny, tokens, lengths, cache_spec=exact_spec, max_new_tokens=3)
    last, one = first.tokens[:, -1:], jnp.ones(3, jnp.int32)
    for _ in range(2):
        second = generate(tiny, last, one, cache=first.cache, max_new_tokens=NEW - 3)
        assert [a + b for a, b in zip(first.sequences(), second.sequences(), strict=True)] == greedy.sequences()
    assert second.cache.length.tolist() == greedy.cache.length.tolist()


@pytest.mark.slow
def test_goes_on_behind_a_saved_cache(tiny, packed_spec, prompts, tmp_path):
    first = generate(tiny, *prompts, cache_spec=packed_spec, max_new_tokens=3)
    tq.save_cache(first.cache, tmp_path / "cache")
    loaded = tq.load_cache(tmp_path / "cache", max_tokens=256)
    turn, lengths = pad_prompts([[7, 8, 9], [4], [1, 2]])
    from_disk, kept = (
        generate(tiny, turn, lengths, cache=cache, max_new_tokens=4).sequences() for cache in (loaded, first.cache)
    )
    assert from_disk == kept


def test_refuses_to_go_on(tiny, exact_spec, prompts, greedy):
    tokens, lengths = prompts
    for given, word in (({}, "neither"), ({"cache_spec": exact_spec, "cache": greedy.cache}, "both")):
        with pytest.raises(ValueError, match=f"expected one of cache_spec and cache, got {word}"):
            generate(tiny, tokens, lengths, max_new_tokens=1, **given)
    with pytest.raises(ValueError, match=r"expected 3 rows \(3 layers x 1 sequences\), got 9"):
        generate(tiny, tokens[:1], lengths[:1], cache=greedy.cache, max_new_tokens=1)
    for cache, message in (
        (
            tq.init_cache(dataclasses.replace(exact_spec, num_kv_heads=1), batch=9),
            r"cache.spec \(num_kv_heads, head_dim\): expected \(2, 16\), got \(1, 16\)",
        ),
        (
            dataclasses.replace(greedy.cache, length=greedy.cache.length.at[4].add(1)),
            r"cache: expected equal numbers of tokens in all layers of a sequence, got \[\[28, 6, 16\], \[28, 7, 16\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generate(tiny, tokens, lengths, cache=cache, max_new_tokens=1)
    marked = dataclasses.replace(greedy.cache, overflow=greedy.cache.overflow.at[4].set(True))
    with pytest.raises(
        ValueError, match=r"cache: expected rows that hold all their tokens, got overflow in rows \[4\]"
    ):
        generate(tiny, tokens, lengths, cache=marked, max_new_tokens=1)
    with pytest.raises(
        ValueError, match=r"cache.spec.max_tokens: expected room for 150 tokens \(28 in the cache \+ prompt 23 \+ 100"
    ):
        generate(tiny, tokens, lengths, cache=greedy.cache, max_new_tokens=100)
