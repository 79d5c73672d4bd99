"""The same words give the same cache everywhere."""

import dataclasses
from types import SimpleNamespace

import pytest

import tq_jax as tq
from interop.vllm.options import Options
from tq_jax.commands.divergence import tq_scheme

BITS = [(4, 4), (3, 3), (2, 2), (8, 4), (2.5, 3.5)]


@pytest.mark.parametrize(("key_bits", "value_bits"), BITS)
def test_evaluation_and_vllm_use_the_recommended_cache(key_bits, value_bits, unchecked_shapes):
    spec = tq.CacheSpec.recommended(2, 64, 1000, key_bits, value_bits)
    decoder = SimpleNamespace(config=SimpleNamespace(num_kv_heads=2, head_dim=64))
    assert tq_scheme(decoder, 1000, key_bits=key_bits, value_bits=value_bits).cache == spec
    options = Options(key_bits=key_bits, value_bits=value_bits)
    assert options.quantizers(64) == tq.recommended_quantizers(64, key_bits, value_bits) == (spec.key, spec.value)


@pytest.mark.parametrize(("key_bits", "value_bits"), BITS)
def test_transformers_use_the_recommended_cache(key_bits, value_bits):
    pytest.importorskip("transformers")
    from interop.hf.layer import Compression

    compression = Compression(key_bits, value_bits, max_tokens=1000, seed=0, options={})
    assert compression.spec(2, 64, prompt=10) == tq.CacheSpec.recommended(2, 64, 1000, key_bits, value_bits)
    other = Compression(key_bits, value_bits, max_tokens=1000, seed=0, options={"window": 0, "key": SKETCHED})
    wanted = tq.CacheSpec.recommended(2, 64, 1000, value_bits=value_bits, window=0, key=SKETCHED)
    assert other.spec(2, 64, prompt=10) == wanted


SKETCHED = tq.QuantizerSpec(64, 3, kind="prod")


def test_recommended_is_what_it_says():
    spec = tq.CacheSpec.recommended(2, 64, 1000, value_bits=3, window=24, dtype="float32")
    assert spec == tq.CacheSpec(
        num_kv_heads=2,
        head_dim=64,
        max_tokens=1000,
        key=tq.QuantizerSpec(64, 4, scale="unbiased", search=True),
        value=tq.QuantizerSpec(64, 3, scale="least_squares", search=True),
        window=24,
        sink_tokens=4,
        center_keys=True,
        smooth_keys=True,
        dtype="float32",
    )
    full = tq.CacheSpec.recommended(2, 64, 1000, key=None, value=None)
    assert not full.compressed


def test_kinds_without_a_search_or_a_choice_of_scale():
    found = tq.recommended_quantizers(64, 3, 2, key_kind="prod", value_kind="group")
    assert found == (SKETCHED, tq.QuantizerSpec(64, 2, kind="group"))
    plain = tq.recommended_quantizers(64, search=False)
    assert plain == tuple(dataclasses.replace(spec, search=False) for spec in tq.recommended_quantizers(64))


def test_bits_and_fields_that_do_not_exist():
    with pytest.raises(NotImplementedError, match="kind='mse' has bits in .*, got bits=6"):
        tq.CacheSpec.recommended(2, 64, 1000, key_bits=6)
    with pytest.raises(TypeError, match="colour"):
        tq.CacheSpec.recommended(2, 64, 1000, colour="red")
