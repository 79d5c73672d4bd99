"""Several GPUs draw the tokens of one, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.gpu.decoders import SHAPES, cache_spec, random_decoder
from tq_jax.models import generate, pad_prompts

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("jax_gpu")]

NEW_TOKENS = 64
PROMPTS = 1200, 517


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
    rng = np.random.default_rng(0)
    prompts = pad_prompts([rng.integers(0, decoder.config.vocab_size, n).tolist() for n in PROMPTS])
    options = {"cache_spec": cache_spec(decoder.config, 2048, bits), "max_new_tokens": NEW_TOKENS, "precise": True}
    alone = generate(decoder, *prompts, **options)
    mesh = jax.make_mesh((2,), (axis,))
    found = [generate(decoder, *prompts, mesh=mesh, **options) for _ in range(2)]
    assert found[0].sequences() == found[1].sequences()
    assert found[0].sequences() == alone.sequences()
