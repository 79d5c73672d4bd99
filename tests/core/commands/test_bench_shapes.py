"""Shapes of published models that `tq-jax bench model` knows by name."""

import math

import jax
import jax.numpy as jnp
import pytest

from tq_jax.commands.bench.model import shapes

PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-3b": 3_212_749_824,
    "llama3-1b": 1_235_814_400,
    "qwen3-8b": 8_190_735_360,
    "qwen3-4b": 4_022_468_096,
    "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b": 7_248_023_552,
    "smollm2": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_numbers_of_parameters(name):
    decoder = jax.eval_shape(lambda: shapes.random_decoder(shapes.SHAPES[name], jnp.bfloat16))
    leaves = jax.tree.leaves(decoder)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PUBLISHED[name]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
