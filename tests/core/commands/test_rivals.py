import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer

from tq_jax.codebook import lloyd_max
from tq_jax.commands import divergence as la
from tq_jax.commands.eval.schemes import Rounded
from tq_jax.commands.rivals import roundings as room
from tq_jax.commands.rivals.cache import attend_dense, empty, fill, seen_everywhere
from tq_jax.commands.rivals.own import load_rivals

BY_LABEL = {rival.label: rival for rival in room.RIVALS}


def tokens(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def everywhere(x):
    return jnp.ones(x.shape[1], bool)


@pytest.mark.parametrize(("preset", "slot"), [("4bit_nc", 70), ("k3v4_nc", 62), ("3bit_nc", 54), ("k8v4", 100)])
def test_slots_of_the_presets(preset, slot):
    rival = BY_LABEL[f"vLLM {preset}"]
    assert (rival.key.stored_bits(64) + rival.value.stored_bits(64)) * 64 / 8 == slot
    # Two layers at each end are left in 16 bits.
    assert rival.stored_bits(64, 30) == pytest.approx((4 * 16 + 26 * slot / 16) / 30)


OWN = """
import dataclasses

from tq_jax.commands.rivals.roundings import Float8, Rival

rival = Rival("own", "my own", Float8(), Float8())
same_label = dataclasses.replace(rival, label="fp8 e4m3")
no_rounding = dataclasses.replace(rival, key=8)
"""


def test_a_rival_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_rivals.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert [rival.label for rival in load_rivals(["own_rivals:rival"])] == ["my own"]
    wrong = {
        "own_rivals": "expected a rival as MODULE:NAME, got 'own_rivals'",
        "own_rivals:none": "expected own_rivals:none to be importable from .*, got module .* has no attribute 'none'",
        "no_such_module:x": "expected no_such_module:x to be importable from .*, got No module named",
        "own_rivals:no_rounding": "expected key and value of own_rivals:no_rounding to be Roundings, got a int",
        "own_rivals:dataclasses": "expected own_rivals:dataclasses to be a Rival, got a module",
        "own_rivals:same_label": "expected rivals with labels of their own, got fp8 e4m3 twice",
    }
    for name, message in wrong.items():
        with pytest.raises(typer.BadParameter, match=message):
            load_rivals([name])


def test_stored_bits_count_scales_and_zeros():
    stored = {label: rival.stored_bits(128, 8) for label, rival in BY_LABEL.items() if not rival.exact_layers}
    assert stored["TurboQuant mse 4"] == 4 + 16 / 128
    assert stored["TurboQuant prod 4"] == 4 + (32 + 16) / 128 / 2
    assert stored["KIVI 2, groups of 32"] == 3
    assert stored["KIVI 4, groups of 128"] == 4.25
    assert stored["int4, Hadamard"] == 4 + 32 / 128
    assert stored["fp8 e4m3"] == 8


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_keys_are_within_half_a_step_of_their_group(bits):
    x = tokens(0, 2, 100, 3, 16)
    valid = jnp.arange(100) < 90
    x = jnp.where(valid[None, :, None, None], x, jnp.nan)
    found = room.PerChannel(bits, 32)(x, valid)
    for start, stop in ((0, 32), (32, 64), (64, 90)):
        part = np.asarray(x[:, start:stop])
        step = (part.max(1) - part.min(1)) / (2**bits - 1)
        error = np.abs(np.asarray(found[:, start:stop]) - part).max(1)
        assert np.all(error <= 0.5 * step + 2e-3)
        assert np.all(error > 0.1 * step)


def test_kivi_values_are_exact_on_their_own_levels():
    steps = jnp.arange(4.0)[None] * jnp.array([[0.5], [2.0]])  # two groups with ranges of their own
    x = jnp.tile(steps.reshape(1, 1, 1, 8), (1, 5, 2, 1)) - 3.0
    np.testing.assert_array_equal(room.PerToken(2, 4)(x, everywhere(x)), x)
    assert not np.array_equal(room.PerToken(2, 8)(x, everywhere(x)), x)


def test_vllm_keys_keep_the_norm_and_the_transform_is_plain():
    x = tokens(1, 1, 50, 2, 64)
    found = room.VllmKeys(4)(x, everywhere(x))
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-3)
    error = jnp.sum((found - x) ** 2) / jnp.sum(x**2)
    assert 0.0085 < float(error) < 0.0105  # Lloyd-Max at 4 bits
    # A constant vector is one coordinate after a transform without signs: as bad as can be.
    spike = jnp.ones((1, 1, 1, 64))
    y = room.VllmKeys(4, norm_correction=False)(spike, everywhere(spike))
    assert float(y[0, 0, 0].sum()) / 8 == pytest.approx(2.7326, rel=1e-2)


def test_normal_centroids():
    assert lloyd_max(room.GAUSSIAN_DIM, 2) * room.GAUSSIAN_DIM**0.5 == pytest.approx([0.4528, 1.5104], abs=1e-4)


def test_vllm_values_and_int4_are_within_half_a_step():
    x = tokens(2, 1, 40, 2, 64)
    span = jnp.max(x, axis=-1) - jnp.min(x, axis=-1)
    error = jnp.max(jnp.abs(room.VllmValues(3)(x, everywhere(x)) - x), axis=-1)
    assert bool(jnp.all(error <= span / 14 + 5e-3))
    int4 = room.Int4()(x, everywhere(x))
    relative = float(jnp.linalg.norm(int4 - x) / jnp.linalg.norm(x))
    assert 0.05 < relative < 0.12


def test_fp8_rounds_to_three_bits_of_mantissa_and_saturates():
    x = jnp.array([1.0, 1.0625, 1.07, 17.0, 1e4, -1e4, 2.0**-10, 1e-4]).reshape(1, 1, 1, 8)
    found = room.Float8()(x, everywhere(x))[0, 0, 0]
    assert found.tolist() == [1.0, 1.0, 1.125, 16.0, 448.0, -448.0, 0.0, 0.0]


def test_published_turboquant_has_the_error_of_theory():
    x = tokens(3, 1, 200, 2, 64)
    for bits, expected in ((2, 0.11453), (3, 0.03339), (4, 0.00913)):
        found = room.TurboQuant(bits)(x, everywhere(x))
        error = jnp.mean(jnp.sum((found - x) ** 2, axis=-1) / jnp.sum(x**2, axis=-1))
        assert float(error) == pytest.approx(expected, rel=0.04)


@pytest.fixture(scope="module")
def reference(decoder):
    ids = np.random.default_rng(0).integers(0, 97, 2 * la.CHUNK + 201).tolist()
    return la.make_reference(decoder, ids, positions=2 * la.CHUNK)


KEEP = room.Rival("keep", "exact", room.Float8(), room.Float8(), exact_layers=2)
EIGHT = room.Rival("eight", "fp8", room.Float8(), room.Float8())


@pytest.mark.slow
def test_a_rival_that_quantizes_nothing_is_full_precision(decoder, reference):
    found = la.measure(decoder, reference, Rounded(KEEP, 400, 64, 4))
    assert found.kl_mean < 1e-5  # bfloat16
    assert found.positions == 2 * la.CHUNK


def test_only_tokens_between_sinks_and_window_are_rounded(decoder, reference):
    _, key, value = reference.projections
    sizes = dict(rows=3, layers=3, max_tokens=300, heads=(2, 32), window=64, sinks=4)
    cache = fill(empty(EIGHT, **sizes), key, value, jnp.int32(reference.prefix))
    keys, _ = seen_everywhere(cache)
    stored = key.astype(jnp.bfloat16).astype(jnp.float32)
    changed = np.any(np.asarray(keys[:, : reference.prefix] != stored), axis=(0, 2, 3))
    assert not changed[:4].any()
    assert changed[4 : reference.prefix - 64].all()
    assert not changed[reference.prefix - 64 :].any()


def test_chunks_read_what_a_longer_prompt_would(decoder, reference):
    """The second chunk sees the same keys whether the first one came as a chunk or within the prompt."""
    scheme = Rounded(room.kivi(2, 16), 400, 32, 4)
    cache = scheme.start(decoder, reference)
    ids = reference.tokens[None, reference.prefix : reference.prefix + la.CHUNK]
    logits, cache = scheme.extend(decoder, ids, cache)
    padded = jnp.pad(ids, ((0, 0), (0, 16)))
    again, ragged = scheme.extend(decoder, padded, scheme.start(decoder, reference), count=jnp.int32(la.CHUNK))
    assert int(cache.length) == int(ragged.length) == reference.prefix + la.CHUNK
    np.testing.assert_allclose(again[: la.CHUNK], logits, atol=2e-4)


def test_dense_attention():
    q, k, v = tokens(4, 1, 3, 4, 8), tokens(5, 1, 9, 2, 8), tokens(6, 1, 9, 2, 8)
    out = attend_dense(q, k, v, jnp.int32(5), scale=0.3, sliding_window=4)
    for t in range(3):
        for h in range(4):
            seen = slice(5 + t - 3, 5 + t + 1)
            p = jax.nn.softmax(k[0, seen, h // 2] @ q[0, t, h] * 0.3)
            np.testing.assert_allclose(out[0, t, h], p @ v[0, seen, h // 2], atol=1e-5)


def test_dense_attention_with_a_soft_cap_and_sink_logits():
    q, k, v = tokens(4, 1, 1, 4, 8), tokens(5, 1, 6, 2, 8), tokens(6, 1, 6, 2, 8)
    sinks = tokens(7, 4)
    out = attend_dense(q, k, v, jnp.int32(5), scale=0.3, softcap=0.5, sink_logits=sinks)
    for h in range(4):
        logits = 0.5 * jnp.tanh(k[0, :, h // 2] @ q[0, 0, h] * 0.3 / 0.5)
        p = jax.nn.softmax(jnp.append(logits, sinks[h]))[:-1]
        np.testing.assert_allclose(out[0, 0, h], p @ v[0, :, h // 2], atol=1e-5)


def test_odd_dimensions_of_a_plain_transform_are_refused():
    x = jnp.ones((1, 2, 1, 48))
    with pytest.raises(NotImplementedError, match="plain Hadamard transform has a power of two channels, got 48"):
        room.VllmKeys(4)(x, everywhere(x))


def test_prod_is_noisier_than_mse_at_equal_bits():
    x = tokens(7, 1, 64, 1, 64)
    errors = [float(jnp.sum((room.TurboQuant(4, kind)(x, everywhere(x)) - x) ** 2)) for kind in ("mse", "prod")]
    assert errors[1] > 2 * errors[0]
    assert math.isfinite(errors[1])
