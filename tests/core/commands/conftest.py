import jax
import pytest
from flax import nnx

from tq_jax.models import Decoder, DecoderConfig


@pytest.fixture
def usual_compiler():
    """Programs of real models take longer without optimization than optimizing them does."""
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="module")
def decoder():
    """A small Llama with random weights."""
    config = DecoderConfig(
        vocab_size=97, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=96, max_context=1024
    )
    return Decoder(config, rngs=nnx.Rngs(0))
