import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tq_jax.commands import divergence as la
from tq_jax.commands.eval.schemes import Rounded
from tq_jax.commands.rivals import calibrated as room
from tq_jax.commands.rivals.cache import seen_everywhere
from tq_jax.commands.rivals.roundings import RIVALS, TurboQuant

LAYERS, HEADS, GROUP, TOKENS, DIM = 2, 2, 2, 200, 32


@pytest.fixture(scope="module")
def heads():
    """Queries, keys and values, some of whose directions have far more energy than others."""
    rng = np.random.default_rng(0)
    slope = 2.0 ** -np.linspace(0, 6, DIM // 2)
    scale = np.concatenate([slope, slope])
    shapes = [(LAYERS, TOKENS, count, DIM) for count in (HEADS * GROUP, HEADS, HEADS)]
    return [(rng.normal(size=shape) * scale).astype(np.float32) for shape in shapes]


def of_layer(fitted, layer):
    return jax.tree.map(lambda array: array[layer], fitted)


def read(part, fitted, x):
    return np.stack([part.read(jnp.asarray(x[i : i + 1]), of_layer(fitted, i))[0] for i in range(LAYERS)])


def logit_error(query, key, found):
    grouped = query.reshape(LAYERS, TOKENS, HEADS, GROUP, DIM)
    errors = np.einsum("lthgd,lshd->lhgts", grouped, np.asarray(found) - key)
    return float(np.sqrt(np.mean(errors**2)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_block_bits_follow_the_energy(heads, bits):
    rival = room.block_gtq(bits)
    fitted, nothing = room.fit(rival, *heads, TOKENS)
    assert nothing == () and rival.value == TurboQuant(bits, seed=1)
    widths = np.asarray(fitted.widths)
    assert widths.mean() == bits
    np.testing.assert_array_equal(widths[..., : DIM // 2], widths[..., DIM // 2 :])  # as RoPE pairs channels
    assert (np.diff(widths[..., : DIM // 2].astype(float).mean((0, 1))) <= 1).all()
    assert widths[..., 0].min() > widths[..., DIM // 2 - 1].max()
    identity = np.einsum("lhij,lhkj->lhik", fitted.forward, fitted.forward)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(DIM), identity.shape), atol=1e-5)
    query, key, _ = heads
    found = read(rival.key, fitted, key)
    plain = TurboQuant(bits)(jnp.asarray(key), jnp.ones(TOKENS, bool))
    assert logit_error(query, key, found) < 0.6 * logit_error(query, key, plain)


def test_equal_energies_get_equal_bits_and_turboquants_error():
    rng = np.random.default_rng(1)
    heads = [rng.normal(size=(1, 2000, 1, 64)).astype(np.float32) for _ in range(3)]
    fitted, _ = room.fit(room.block_gtq(4), *heads, 2000)
    found = room.BlockBits(4).read(jnp.asarray(heads[1]), of_layer(fitted, 0))
    error = np.sum((np.asarray(found) - heads[1]) ** 2) / np.sum(heads[1] ** 2)
    assert error == pytest.approx(0.0095, rel=0.1)


def test_every_coordinate_of_oscar_matters_alike(heads):
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(DIM, DIM)))
    query, key, value = heads[0] @ turn.astype(np.float32), *heads[1:]
    rival = room.oscar(2)
    fitted = room.fit(rival, query, key, value, TOKENS)
    grouped = query.reshape(LAYERS, TOKENS, HEADS, GROUP, DIM)
    covariance = np.einsum("lthgi,lthgj->lhij", grouped, grouped)
    turned = np.einsum("lhij,lhjk,lhik->lhi", fitted[0].forward, covariance, fitted[0].forward)
    np.testing.assert_allclose(turned, np.broadcast_to(turned.mean(-1, keepdims=True), turned.shape), rtol=1e-4)
    for part, arrays, x in zip((rival.key, rival.value), fitted, (key, value), strict=True):
        identity = np.einsum("lhij,lhkj->lhik", arrays.forward, arrays.forward)
        np.testing.assert_allclose(identity, np.broadcast_to(np.eye(DIM), identity.shape), atol=1e-5)
        assert np.isin(np.asarray(arrays.clip), np.asarray(room.CLIPS, np.float32)).all()
        assert np.isfinite(read(part, arrays, np.zeros_like(x))).all()
        error = np.sum((read(part, arrays, x) - x) ** 2) / np.sum(x**2)
        assert 0.05 < error < 0.5


def test_stored_bits_and_labels():
    stored = {rival.label: rival.stored_bits(128, 8) for rival in room.CALIBRATED}
    assert stored["Block-GTQ 4"] == 4 + 16 / 128
    assert stored["OSCAR 2"] == 2 + 32 / 128
    assert len({rival.label for rival in room.EVERY}) == len(room.EVERY)
    assert room.compiled_with(room.CALIBRATED[0]) == room.CALIBRATED[:1]
    assert room.compiled_with(RIVALS[0]) == RIVALS


@pytest.mark.parametrize("rival", [room.block_gtq(2), room.oscar(2)], ids=lambda rival: rival.name)
def test_a_cache_reads_old_tokens_by_the_calibration_of_the_text(decoder, rival):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, 64), jnp.int32)
    _, projections = la.run_prompt(decoder, tokens[None])
    reference = la.Reference(tokens, 64, projections, [])
    cache = Rounded(rival, 128, window=16, sinks=4).start(decoder, reference)
    found = [np.asarray(x)[:, :64] for x in seen_everywhere(cache)]
    parts = zip((rival.key, rival.value), cache.fitted, projections[1:], found, strict=True)
    for part, arrays, exact, seen in parts:
        exact = np.asarray(exact.astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(seen[:, :4], exact[:, :4])
        np.testing.assert_array_equal(seen[:, 48:], exact[:, 48:])
        if isinstance(part, room.Calibrated):
            expected = part.read(jnp.asarray(exact[1:2, 4:48]), of_layer(arrays, 1))[0]
            np.testing.assert_allclose(seen[1, 4:48], expected, atol=1e-5)


def test_a_head_that_no_hadamard_matrix_fits_is_refused():
    heads = [np.ones((1, 8, 1, 24), np.float32) for _ in range(3)]
    with pytest.raises(NotImplementedError, match="power of two channels, got 24"):
        room.fit(room.oscar(4), *heads, 8)
