import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.attention import LogitOptions, PagedArguments, Partial, decode_attention, merge
from pallas_kernels.encode import encode
from pallas_kernels.pages import empty_pages, write_tokens
from tq_jax.quantizer import encode_rotated, sketch_gain, sketch_query, to_rotated

PAGE, HEADS, DIM = 16, 2, 32
FORMATS = [
    (tq.QuantizerSpec(DIM, 4), tq.QuantizerSpec(DIM, 3)),
    (tq.QuantizerSpec(DIM, 2), tq.QuantizerSpec(DIM, 8)),
    (tq.QuantizerSpec(DIM, 2.5), tq.QuantizerSpec(DIM, 3.5)),
    (tq.QuantizerSpec(DIM, 3, kind="prod"), tq.QuantizerSpec(DIM, 2, kind="group", group=16)),
    (tq.QuantizerSpec(DIM, 1, kind="prod"), tq.QuantizerSpec(DIM, 1)),
    (tq.QuantizerSpec(DIM, 8, kind="prod", scale_dtype="float32"), tq.QuantizerSpec(DIM, 5, scale_dtype="float32")),
]
FORMAT_IDS = [f"{k.kind}{k.bits}-{v.kind}{v.bits}" for k, v in FORMATS]


def pool(key_spec, value_spec, lengths, *, shuffle, seed=0):
    """Pages with ragged sequences, poisoned wherever nothing was written, and the inputs of dense attention."""
    rng = np.random.default_rng(seed)
    batch, per_row = len(lengths), -(-max(lengths) // PAGE) + 1
    order = rng.permutation(batch * per_row) if shuffle else np.arange(batch * per_row)
    table = order.reshape(batch, per_row).astype(np.int32)
    quantizers = [tq.make_quantizer(spec, seed=i) for i, spec in enumerate((key_spec, value_spec))]
    pages = poisoned(empty_pages(batch * per_row, HEADS, PAGE, key_spec.format, value_spec.format))
    tokens = max(lengths)
    x = [rng.standard_normal((batch, tokens, HEADS, DIM)).astype(np.float32) for _ in range(2)]
    codes = [jax.jit(encode_rotated)(q, jnp.asarray(y)) for q, y in zip(quantizers, x, strict=True)]
    step = np.arange(tokens)
    page = np.where(step[None] < np.array(lengths)[:, None], table[:, step // PAGE], batch * per_row)
    slot = np.broadcast_to(step % PAGE, page.shape)
    pages = jax.jit(write_tokens)(pages, jnp.asarray(page), jnp.asarray(slot), *codes)
    # Keys and values for dense attention are in the rotated basis, as queries are.
    dense = [np.asarray(rotated_estimate(q, c)) for q, c in zip(quantizers, codes, strict=True)]
    return pages, jnp.asarray(table), quantizers, dense


@jax.jit
def rotated_estimate(q, code):
    return to_rotated(q, tq.dequantize(q, code))


def poisoned(pages):
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0xA5), pages)


def dense_attention(query, keys, values, lengths, positions, options, bias=None):
    """Softmax attention in numpy, float64; zeros where nothing is visible."""
    batch, count, heads, _ = query.shape
    out = np.zeros((batch, count, heads, values.shape[-1]))
    for b in range(batch):
        for t in range(count):
            seen = np.arange(lengths[b])
            seen = seen[seen <= positions[b, t]]
            if options.sliding_window is not None:
                seen = seen[seen > positions[b, t] - options.sliding_window]
            for h in range(heads if len(seen) else 0):
                kv = h // (heads // keys.shape[2])
                logits = keys[b, seen, kv].astype(np.float64) @ query[b, t, h] * options.scale
                logits += 0 if bias is None else bias[b, t, h]
                if options.softcap is not None:
                    logits = options.softcap * np.tanh(logits / options.softcap)
                p = np.exp(logits - logits.max())
                out[b, t, h] = p @ values[b, seen, kv] / p.sum()
    return out


def run(pages, table, quantizers, lengths, query, positions, options, bias=None):
    key, value = quantizers
    sketch = None
    if key.spec.kind == "prod":
        sketch = sketch_query(key, query) * sketch_gain(DIM)
    partial = jax.jit(decode_attention)(
        PagedArguments(
            query, pages, table, jnp.asarray(lengths, jnp.int32),
            positions=positions, key_format=key.spec.format, value_format=value.spec.format,
            options=options, logit_bias=bias, sketch_query=sketch,
        )
    )  # fmt: skip
    return np.asarray(partial.acc / jnp.where(partial.total > 0, partial.total, 1)[..., None])


@pytest.mark.parametrize("specs", FORMATS, ids=FORMAT_IDS)
def test_parity_with_dense_attention(specs):
    lengths = [77, 1, 0, 64]
    pages, table, quantizers, dense = pool(*specs, lengths, shuffle=specs != FORMATS[0])
    query = np.random.default_rng(1).standard_normal((4, 1, 6, DIM)).astype(np.float32)
    positions = np.array([[100], [100], [100], [63]], np.int32)
    options = LogitOptions(scale=0.3)
    got = run(pages, table, quantizers, lengths, jnp.asarray(query), jnp.asarray(positions), options)
    want = dense_attention(query, *dense, lengths, positions, options)
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())
    again = run(pages, table, quantizers, lengths, jnp.asarray(query), jnp.asarray(positions), options)
    np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize(
    ("sliding_window", "softcap", "count"),
    [(None, 2.0, 5), (1, None, 1), (33, 2.0, 1), (33, None, 5), (10_000, None, 5)],
)
def test_windows_caps_and_several_queries(sliding_window, softcap, count):
    lengths = [600, 41]
    pages, table, quantizers, dense = pool(*FORMATS[0], lengths, shuffle=True, seed=3)
    rng = np.random.default_rng(2)
    query = rng.standard_normal((2, count, 4, DIM)).astype(np.float32)
    bias = rng.standard_normal((2, count, 4)).astype(np.float32)
    # Some queries are older than the last stored token: a chunk that is in the pages already.
    positions = np.array([[598], [38]], np.int32) + np.arange(count, dtype=np.int32)
    options = LogitOptions(scale=0.4, softcap=softcap, sliding_window=sliding_window)
    got = run(pages, table, quantizers, lengths, jnp.asarray(query), jnp.asarray(positions), options, jnp.asarray(bias))
    want = dense_attention(query, *dense, lengths, positions, options, bias)
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


def test_merge_is_attention_over_the_union():
    rng = np.random.default_rng(0)
    logits, values = rng.standard_normal(10), rng.standard_normal((10, 3))

    def part(chosen):
        peak = logits[chosen].max()
        p = np.exp(logits[chosen] - peak)
        shaped = [jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (p @ values[chosen], peak, p.sum())]
        return Partial(shaped[0], shaped[1][..., 0], shaped[2][..., 0])

    both = merge(part(np.arange(4)), part(np.arange(4, 10)))
    p = np.exp(logits - logits.max())
    np.testing.assert_allclose(both.acc / both.total[..., None], (p @ values / p.sum()).reshape(1, 1, 1, 3), rtol=1e-5)


def test_tokens_without_a_page_are_not_written():
    key, value = FORMATS[0]
    pages = empty_pages(2, HEADS, PAGE, key.format, value.format)
    codes = [encode(jnp.ones((1, 3, HEADS, DIM)), spec.format) for spec in (key, value)]
    written = write_tokens(pages, jnp.array([[0, 2, 7]]), jnp.array([[0, 1, 2]]), *codes)
    changed = np.asarray(jnp.any(written.keys.packed != pages.keys.packed, axis=(1, 3)))
    assert np.argwhere(changed).tolist() == [[0, 0]]
    assert float(jnp.sum(written.values.scale != 0)) == HEADS


def test_errors():
    key, value = FORMATS[0]
    pages = empty_pages(2, HEADS, PAGE, key.format, value.format)

    def call(query, implementation="auto", **options):
        arguments = dict(
            positions=jnp.zeros((1, 1), jnp.int32),
            key_format=key.format,
            value_format=value.format,
            options=LogitOptions(scale=1.0),
        )
        given = PagedArguments(
            query, pages, jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32), **(arguments | options)
        )
        return decode_attention(given, implementation=implementation)

    with pytest.raises(
        ValueError, match=r"expected queries with a multiple of 2 heads and dim 32, got \(1, 1, 3, 32\)"
    ):
        call(jnp.zeros((1, 1, 3, DIM)))
    with pytest.raises(ValueError, match="expected sketch_query exactly for Prod keys, got sketch_query=True"):
        call(jnp.zeros((1, 1, 2, DIM)), sketch_query=jnp.zeros((1, 1, 2, DIM)))
    with pytest.raises(NotImplementedError, match="implementation='mosaic'; decode_attention has: "):
        call(jnp.zeros((1, 1, 2, DIM)), implementation="mosaic")
    assert dataclasses.asdict(LogitOptions(scale=1.0))["softcap"] is None
