"""A model of your own in Flax NNX that generates from a compressed cache.

    python examples/flax_loop.py [--steps 60] [--bits 4]

A small model learns the beginning of a novel by heart, letter by letter, in seconds: attention is that of Flax, without
a cache. Then it recites, once from a cache in full precision and once from a compressed one. The loop is one compiled
`lax.scan`, and the caches are updated in place.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tq_jax as tq
from tq_jax.data import persuasion
from tq_jax.nnx import CompressedAttention

LAYERS, HEADS, DIM = 2, 2, 64
LEARNT, PROMPT = 240, 40
"""Letters that are learnt, and letters that are given."""


class Block(nnx.Module):
    """Attention over the tokens so far, then a feed-forward layer."""

    def __init__(self, spec: tq.CacheSpec, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.RMSNorm(DIM, rngs=rngs) for _ in range(2)])
        self.attention = CompressedAttention(HEADS, DIM, rope_base=1e4, cache_spec=spec, rngs=rngs)
        self.up, self.down = nnx.Linear(DIM, 4 * DIM, rngs=rngs), nnx.Linear(4 * DIM, DIM, rngs=rngs)

    def __call__(self, x: jax.Array, cache: tq.Cache | None) -> tuple[jax.Array, tq.Cache | None]:
        """Outputs, and the cache with the new tokens; without a cache, tokens see each other."""
        normed = self.norms[0](x)
        if cache is None:
            mixed = self.attention(normed, decode=False, is_causal=True)  # training: as in Flax
        else:
            mixed, cache = self.attention.extend(normed, cache)  # appends, then attends
        x = x + mixed
        return x + self.down(nnx.gelu(self.up(self.norms[1](x)))), cache


class Letters(nnx.Module):
    """A model that predicts the next letter."""

    def __init__(self, letters: int, spec: tq.CacheSpec, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(letters, DIM, rngs=rngs)
        self.blocks = nnx.List([Block(spec, rngs) for _ in range(LAYERS)])
        self.norm, self.head = nnx.RMSNorm(DIM, rngs=rngs), nnx.Linear(DIM, letters, rngs=rngs)

    def __call__(self, tokens: jax.Array, caches: list[tq.Cache] | None = None) -> tuple[jax.Array, list]:
        """Logits of the next letter after each, and the caches with the new letters."""
        x, found = self.embed(tokens), []
        for block, cache in zip(self.blocks, caches or [None] * LAYERS, strict=True):
            x, cache = block(x, cache)
            found.append(cache)
        return self.head(self.norm(x)), found


def train(model: Letters, text: jax.Array, steps: int) -> float:
    """Learns a text by heart, and returns the last loss."""
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Letters, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Letters) -> jax.Array:
            logits, _ = model(text[None, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, text[None, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    value = jnp.inf
    for _ in range(steps):
        value = step(model, optimizer)
    return float(value)


def write(model: Letters, prompt: jax.Array, caches: list[tq.Cache], tokens: int) -> tuple[jax.Array, list[tq.Cache]]:
    """The most likely letters after a prompt, and the caches that then hold all of them."""
    graphdef, weights = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=2)  # donated caches are updated in place
    def run(weights: nnx.State, prompt: jax.Array, caches: list[tq.Cache]) -> tuple[jax.Array, list[tq.Cache]]:
        def step(carry: tuple, _: None) -> tuple:
            token, caches = carry
            logits, caches = nnx.merge(graphdef, weights)(token[:, None], caches)
            return (jnp.argmax(logits[:, -1], axis=-1), caches), token

        logits, caches = nnx.merge(graphdef, weights)(prompt, caches)
        first = jnp.argmax(logits[:, -1], axis=-1)
        (_, caches), written = jax.lax.scan(step, (first, caches), None, length=tokens)
        return written[:, 0], caches

    return run(weights, prompt, caches)


def main() -> None:
    """Learns, then recites from both caches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of learning")
    parser.add_argument("--bits", type=int, default=4, help="bits per number of the compressed cache")
    options = parser.parse_args()

    novel = " ".join(persuasion().split())[:LEARNT]
    letters = sorted(set(novel))
    text = jnp.array([letters.index(letter) for letter in novel])
    head_dim = DIM // HEADS
    compressed = tq.CacheSpec.recommended(HEADS, head_dim, LEARNT, options.bits, options.bits, window=16, page_size=16)
    model = Letters(len(letters), compressed, nnx.Rngs(0))
    print(f"loss after {options.steps} steps: {train(model, text, options.steps):.2f}")

    full = tq.CacheSpec.full_precision(num_kv_heads=HEADS, head_dim=head_dim, max_tokens=LEARNT)
    for name, spec in ("bfloat16", full), (f"{options.bits} bits", compressed):
        written, caches = write(
            model, text[None, :PROMPT], [tq.init_cache(spec, batch=1) for _ in range(LAYERS)], LEARNT - PROMPT
        )
        size = sum(cache.nbytes for cache in caches)
        print(f"\n{name}, {size:,} bytes in all:\n{novel[:PROMPT]}{''.join(letters[i] for i in written)}")


if __name__ == "__main__":
    main()
