"""The compiled programs of `generate_many`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.models.in_place import check_in_place
from tq_jax.models import Sampling
from tq_jax.models.many.requests import bucket
from tq_jax.models.many.steps import Batch, FlatDecoder, Rows, advance_rows, empty_rows, fill_rows

GREEDY = Sampling()


def test_few_padded_lengths():
    lengths = {bucket(length, 3000) for length in range(1, 3001)}
    assert lengths == {16, 32, 64, 128, 256, 512, 1024, 2048, 3072}
    assert all(bucket(length, 3000) >= length for length in range(1, 3001))


def fill_arguments(total: int, n: int) -> tuple[Batch, Rows]:
    """Prompts of 20 tokens for n of all rows."""
    counts = jnp.full(n, 20, jnp.int32)
    return Batch(jnp.ones((n, 48), jnp.int32), counts, jnp.arange(n)[::-1], jnp.arange(n), counts), empty_rows(total)


@pytest.mark.parametrize(("kind", "program"), [("exact", "advance"), ("packed", "fill"), ("packed", "advance")])
def test_the_cache_is_updated_in_place(tiny, exact_spec, packed_spec, kind, program):
    spec, decoder = exact_spec if kind == "exact" else packed_spec, FlatDecoder.of(tiny)
    cache = tiny.init_cache(spec, batch=3)
    leaves, tree = jax.tree.flatten(cache)  # flat, because lowering puts placeholders into pytrees
    (batch, rows), key, stop = fill_arguments(3, 2), jax.random.key(0), jnp.zeros(1, jnp.int32)

    def run(decoder, batch, rows, leaves):
        cache = jax.tree.unflatten(tree, leaves)
        if program == "fill":
            *rest, cache = fill_rows.__wrapped__(decoder, batch, rows, cache, key, stop, sampling=GREEDY)
        else:
            options = {"sampling": GREEDY, "steps": 4, "implementation": "auto", "precise": False}
            *rest, cache = advance_rows.__wrapped__(decoder, rows, cache, jnp.zeros(3, bool), key, stop, **options)
        return rest, jax.tree.leaves(cache)

    compiled = jax.jit(run, donate_argnums=3).lower(decoder, batch, rows, leaves).compile()
    check_in_place(compiled, cache)
    # A GPU then runs all steps without asking the host.
    assert ('known_trip_count":{"n":"4"}' in compiled.as_text()) == (program == "advance")


def test_filling_leaves_other_rows_alone(tiny, packed_spec):
    """Rows 2 and 0 are filled, then row 1 alone, in a batch of two whose second entry fills nothing."""
    key, stop = jax.random.key(0), jnp.full(8, -1, jnp.int32)
    batch, rows = fill_arguments(4, 2)
    flat = FlatDecoder.of(tiny)
    batch = dataclasses.replace(batch, rows=jnp.array([2, 0], jnp.int32))
    _, rows, before = fill_rows(flat, batch, rows, tiny.init_cache(packed_spec, batch=4), key, stop, sampling=GREEDY)
    assert before.length.tolist() == [20, 0, 20, 0] * 3
    old = jax.tree.map(np.array, (rows, before))
    batch = dataclasses.replace(
        batch, rows=jnp.array([1, 2], jnp.int32), lengths=jnp.array([20, 0], jnp.int32), tokens=batch.tokens + 1
    )
    _, rows, after = fill_rows(flat, batch, rows, before, key, stop, sampling=GREEDY)
    assert after.length.tolist() == [20, 20, 20, 0] * 3
    for was, now in zip(jax.tree.leaves(old[0]), jax.tree.leaves(rows), strict=True):
        np.testing.assert_array_equal(was[[0, 2, 3]], now[jnp.array([0, 2, 3])])
    for name in ("exact_keys", "exact_values", "length", "compressed", "overflow", "statistics", "pages"):
        pairs = zip(*(jax.tree.leaves(getattr(cache, name)) for cache in (old[1], after)), strict=True)
        for was, now in pairs:
            each = (3, 4, was.shape[0] // 12, *was.shape[1:])
            np.testing.assert_array_equal(was.reshape(each)[:, [0, 2, 3]], np.asarray(now).reshape(each)[:, [0, 2, 3]])
