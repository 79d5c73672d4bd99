"""Dense tokens of packed pages: the reference against the quantizers, and the kernel, interpreted, against it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tq_jax as tq
from pallas_kernels.compat.lowering import lower_for_cuda, triton_kernels
from pallas_kernels.dequantize import DequantizeArguments, dequantize_pages, launch_triton
from pallas_kernels.dequantize.launch_triton import check_supported
from pallas_kernels.pages import empty_pages
from tests.kernels.cases.pages import GROUP2, VARIANTS, Variant, make_case
from tq_jax.dense import reconstruction_matrix
from tq_jax.quantizer import dequantize

NAMES = (
    "k4v4", "k2v2", "k3v3", "k8v8", "k1v1", "k2.5v3.5", "k4v2.5 d64", "prod3 group2", "prod1 v3", "d80", "d96 group",
    "d192", "d256", "pages 16", "pages 32", "pages 256 float32",
)  # fmt: skip
QUICK = {"k4v4", "k2.5v3.5", "prod3 group2", "d80", "pages 16"}
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
ROOM = 3
"""Tokens between two sequences of a result."""


def arguments(variant, *, heads=(0, 1), centred=False, seed=0):
    """Sequences of a variant, and the number of tokens of a result in which they lie apart, in reverse order."""
    x = make_case(variant).arguments
    key, value = (tq.make_quantizer(spec, seed=i) for i, spec in enumerate(variant.specs))
    ends = np.cumsum(np.asarray(x.lengths)[::-1] + ROOM)[::-1]
    given = {}
    if centred:
        draw = np.random.default_rng(seed)
        shape = (len(variant.lengths), 2, variant.dim)
        given = {"mean": jnp.asarray(draw.standard_normal(shape), jnp.float32)}
        given["weight"] = jnp.asarray(draw.uniform(0.5, 2, shape), jnp.float32)
    return DequantizeArguments(
        x.pages,
        reconstruction_matrix(key),
        reconstruction_matrix(value),
        x.block_table,
        x.lengths,
        jnp.asarray(ends - np.asarray(x.lengths), jnp.int32),
        jnp.asarray(heads, jnp.int32),
        key_format=x.key_format,
        value_format=x.value_format,
        **given,
    ), (key, value), int(ends[0])  # fmt: skip


def run(x, tokens, implementation, dtype="float32"):
    op = jax.jit(lambda x: dequantize_pages(x, tokens=tokens, dtype=dtype, implementation=implementation))
    first, second = op(x), op(x)
    return first, second


def written(x, tokens):
    """Whether each place of a result holds a token."""
    places = np.zeros(tokens, bool)
    for start, length in zip(x.starts.tolist(), x.lengths.tolist(), strict=True):
        places[start : start + length] = True
    return places


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_quantizers_own(name):
    variant = VARIANTS[name]
    x, quantizers, tokens = arguments(variant)
    (keys, values), _ = run(x, tokens, "reference")
    found = jax.jit(lambda x: x.pages.gather(x.block_table))(x)
    for row, length in enumerate(variant.lengths):
        codes = [jax.tree.map(lambda leaf, row=row: leaf[row], code) for code in found]
        codes[1] = dataclasses.replace(codes[1], packed=jnp.swapaxes(codes[1].packed, -1, -2))
        for code, quantizer, dense in zip(codes, quantizers, (keys, values), strict=True):
            several = code.scale.ndim == 4
            code = dataclasses.replace(
                code,
                scale=jnp.swapaxes(code.scale, -1, -2) if several else code.scale,
                zero=None if code.zero is None else jnp.swapaxes(code.zero, -1, -2),
            )
            want = np.swapaxes(np.asarray(dequantize(quantizer, code)), 1, 2)  # [n, page_size, h_kv, d]
            start = int(x.starts[row])
            got = np.asarray(dense[start : start + length])
            np.testing.assert_allclose(got, want.reshape(-1, *want.shape[2:])[:length], rtol=0, atol=2e-3)
    assert not np.asarray(keys)[~written(x, tokens)].any()


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_what_the_reference_gives(name):
    x, _, tokens = arguments(VARIANTS[name], centred=name in QUICK)
    want, _ = run(x, tokens, "reference")
    got, again = run(x, tokens, "triton")
    places = written(x, tokens)
    for a, b, c in zip(want, got, again, strict=True):
        wanted = np.asarray(a)[places]
        error = np.linalg.norm(np.asarray(b)[places] - wanted) / np.linalg.norm(wanted)
        assert error <= 5e-4
        np.testing.assert_array_equal(np.asarray(b)[places], np.asarray(c)[places])


def test_some_heads_and_the_type_of_the_result():
    variant = Variant(page_size=64, lengths=(70, 3))
    x, _, tokens = arguments(variant, centred=True)
    (keys, values), _ = run(x, tokens, "reference")
    one = dataclasses.replace(x, heads=jnp.array([1], jnp.int32))
    for implementation in ("reference", "triton"):
        (key, value), _ = run(one, tokens, implementation, "bfloat16")
        assert key.shape == value.shape == (tokens, 1, 128)
        assert key.dtype == value.dtype == jnp.bfloat16
        places = written(x, tokens)
        for got, want in ((key, keys), (value, values)):
            np.testing.assert_allclose(
                np.asarray(got, np.float32)[places, 0], np.asarray(want)[places, 1], rtol=1e-2, atol=2e-2
            )


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant(dim=32), "head dims"),
        (Variant(page_size=48), "page_size=48"),
        (Variant(key={"bits": 4}, value={"bits": 2, "kind": "prod"}), "without a sketch"),
        (Variant(key=GROUP2), "keys of codebook formats, got GroupFormat"),
        (Variant(key={"bits": 5}), "bits=5"),
    ],
    ids=["dim", "pages", "sketch", "groups", "bits"],
)
def test_unsupported_cases_say_so(variant, message):
    key, value = variant.specs
    pages = jax.eval_shape(lambda: empty_pages(4, 2, variant.page_size, key.format, value.format))
    empty = jnp.zeros(1, jnp.int32)
    matrix = jnp.zeros((variant.dim, variant.dim), jnp.float16)
    x = DequantizeArguments(pages, matrix, matrix, empty[None], empty, empty, empty, key.format, value.format)
    with pytest.raises(NotImplementedError, match=message):
        check_supported(x)


def test_one_launch_for_keys_and_one_for_values():
    x, _, tokens = arguments(Variant(key={"bits": 3, "kind": "prod"}, value=GROUP2))
    lowered = lower_for_cuda(
        lambda x: launch_triton.dequantize_pages(x, tokens=tokens, dtype="bfloat16", interpret=False), x
    )
    assert [kernel.name for kernel in triton_kernels(lowered)] == ["dequantize_keys", "dequantize_values"]
