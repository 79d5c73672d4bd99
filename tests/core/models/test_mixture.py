"""Mixtures of experts against the sum over all experts; test_families.py compares whole decoders with transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.core.models.conftest import TINY
from tq_jax.models import Decoder
from tq_jax.models.blocks import swiglu
from tq_jax.models.mixture import TILE, BiasedMixture, Mixture, clamped_swiglu, tiles_of

CONFIG = dataclasses.replace(
    TINY, architecture="mixtral", num_experts=6, experts_per_token=2, dim=16, ffn_dim=12, num_layers=1
)


def mixture(**fields) -> BiasedMixture:
    """A mixture with random biases."""
    made = BiasedMixture(
        dataclasses.replace(CONFIG, **fields), gate=swiglu, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
    )
    for number, module in enumerate((made.router, made.gate_up, made.down)):
        module.bias[...] = jax.random.normal(jax.random.key(number), module.bias.shape)
    return made


def expected(made: BiasedMixture, hidden: np.ndarray, *, normalized: bool) -> np.ndarray:
    """Every expert's output, weighted, of which only the best ones count."""
    router, gate_up, down = (
        (np.asarray(x.kernel[...], np.float64), np.asarray(x.bias[...], np.float64))
        for x in (made.router, made.gate_up, made.down)
    )
    logits = hidden @ router[0].T + router[1]
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-logits, axis=-1)[..., :2]
    weights = np.where((np.arange(6) == best[..., :, None]).any(-2), weights, 0)
    weights /= weights.sum(-1, keepdims=True) if normalized else 1
    both = np.einsum("btc,epfc->btepf", hidden, gate_up[0]) + gate_up[1]
    inner = both[..., 0, :] / (1 + np.exp(-both[..., 0, :])) * both[..., 1, :]
    return np.einsum("bte,btec->btc", weights, np.einsum("btef,ecf->btec", inner, down[0]) + down[1])


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_few_rows_and_many(tokens, normalized):
    """Up to as many rows as experts take an expert each; more of them are cut into tiles."""
    made = mixture(normalized_experts=normalized)
    hidden = np.random.default_rng(tokens).standard_normal((1, tokens, 16)).astype(np.float32)
    found = nnx.jit(lambda made, x: made(x))(made, hidden)
    np.testing.assert_allclose(found, expected(made, hidden, normalized=normalized), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("experts", [[5] * 50, [0, 5] * 25, [0] * 49 + [3], list(range(6)) * 9], ids=str)
def test_tiles_hold_every_row_once(experts):
    tiles = jax.jit(lambda x: tiles_of(x, count=6))(jnp.asarray(experts, jnp.int32))
    rows = np.asarray(tiles.rows)
    exist = rows < len(experts)
    assert sorted(rows[exist].tolist()) == list(range(len(experts)))
    owners = np.broadcast_to(np.asarray(tiles.experts)[:, None], rows.shape)
    np.testing.assert_array_equal(owners[exist], np.asarray(experts)[rows[exist]])
    np.testing.assert_array_equal(rows.reshape(-1)[np.asarray(tiles.places)], np.arange(len(experts)))
    assert rows.shape[1] <= TILE


def test_the_gate_of_gpt_oss_by_hand():
    """Gate 9 counts as 7, up -9 as -7; 2 stays: 2 sigmoid(3.404) (1 + 1)."""
    gate, up = jnp.array([9.0, 2.0, -3.0]), jnp.array([-9.0, 1.0, 9.0])
    by_hand = [7 / (1 + np.exp(-11.914)) * -6, 2 / (1 + np.exp(-3.404)) * 2, -3 / (1 + np.exp(5.106)) * 8]
    np.testing.assert_allclose(clamped_swiglu(gate, up), by_hand, rtol=1e-5)


def test_experts_belong_to_families_that_have_them():
    for config, message in (
        (dataclasses.replace(CONFIG, num_experts=0), "num_experts: expected at least 1 for mixtral, got 0"),
        (dataclasses.replace(CONFIG, architecture="llama"), "num_experts: expected 0 for llama, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoder(config, rngs=nnx.Rngs(0))


def test_no_kernel_is_copied():
    """The program of few rows holds no array of the size of the kernels of all experts besides the parameters."""
    wide = dataclasses.replace(CONFIG, num_experts=64, dim=64, ffn_dim=128)
    made = Mixture(wide, gate=swiglu, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    for tokens in (1, 256):
        hidden = jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32)
        program = jax.jit(lambda made, x: made(x)).lower(made, hidden).compile()
        assert program.memory_analysis().temp_size_in_bytes < made.gate_up.kernel[...].nbytes / 4
