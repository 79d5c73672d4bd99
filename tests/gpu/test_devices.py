"""Several GPUs draw the tokens of one, in float32, except for ties within the rounding of sums over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.gpu.decoders import SHAPES, cache_spec, random_decoder
from tests.gpu.test_generate import forced_logits
from tq_jax.models import generate, pad_prompts
from tq_jax.models.generate import prefill_step
from tq_jax.models.sampling import Sampling

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("jax_gpu")]

NEW_TOKENS = 64
PROMPTS = 1200, 517
TIE = 1e-3
"""Difference of two logits, whose standard deviation is about 1, that rounding may turn round."""


@pytest.fixture(scope="module")
def decoder():
    """Four layers, whose KV heads two devices share."""
    config = dataclasses.replace(SHAPES["Llama shape"], num_layers=4, dim=1024, ffn_dim=3072)
    return random_decoder(config, jnp.dtype("float32"))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("axis", ["heads", "sequence"])
def test_tokens_are_those_of_one_gpu(decoder, axis, bits):
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    rng, spec = np.random.default_rng(0), cache_spec(decoder.config, 2048, bits)
    tokens, lengths = pad_prompts([rng.integers(0, decoder.config.vocab_size, n).tolist() for n in PROMPTS])
    options = {"cache_spec": spec, "max_new_tokens": NEW_TOKENS, "precise": True}
    mesh = jax.make_mesh((2,), (axis,))
    with jax.default_matmul_precision("highest"):
        alone = np.asarray(generate(decoder, tokens, lengths, **options).tokens)
        found, again = (np.asarray(generate(decoder, tokens, lengths, mesh=mesh, **options).tokens) for _ in range(2))
        cache, keys = decoder.init_cache(spec, batch=len(lengths)), jax.random.split(jax.random.key(0), len(lengths))
        _, cache = prefill_step(decoder, tokens, lengths, cache, keys, sampling=Sampling())
        logits = forced_logits(decoder, jnp.asarray(alone[:, :-1]), cache, implementation="triton", precise=True)
    np.testing.assert_array_equal(found, again)
    best = np.sort(np.asarray(logits, np.float64), axis=-1)[..., -2:]  # [NEW_TOKENS - 1, b, 2]
    for row, same in enumerate(found == alone):
        if not same.all():
            first = int(np.argmin(same))
            assert first and best[first - 1, row, 1] - best[first - 1, row, 0] <= TIE, (row, first)
