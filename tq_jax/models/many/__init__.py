"""Generation for more prompts than a cache has rows: a prompt that ends hands its row to the next one."""

from tq_jax.models.many.generations import ManyGenerations, generate_many
from tq_jax.models.many.requests import Finished
from tq_jax.models.many.tally import Tally

__all__ = ["Finished", "ManyGenerations", "Tally", "generate_many"]
