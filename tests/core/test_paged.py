import jax
import jax.numpy as jnp
import numpy as np

import tq_jax as tq
from pallas_kernels.attention import LogitOptions
from tq_jax.paged import attend_paged

D, PAGE = 16, 8


def test_pages_in_any_order():
    """A cache whose pages were shuffled, two sequences sharing their first page, read by block tables."""
    spec = tq.CacheSpec(
        2, D, 40, tq.QuantizerSpec(D, 4), tq.QuantizerSpec(D, 3), window=0, sink_tokens=0, page_size=PAGE
    )
    k, v, q = jax.random.normal(jax.random.key(0), (3, 2, 40, 2, D))
    k = k.at[1, :PAGE].set(k[0, :PAGE])
    v = v.at[1, :PAGE].set(v[0, :PAGE])
    given = jnp.full((2, D), 0.3), jnp.full((2, D), 1.5)
    lengths = jnp.array([40, 21], jnp.int32)
    cache = tq.append(tq.init_cache(spec, 2, statistics=given), k, v, lengths=lengths)
    counts, sinks = jnp.array([5, 3], jnp.int32), jnp.array([0.5, -1.0])
    expected = tq.attend(q[:, :5], cache, lengths=counts, sink_logits=sinks, softcap=4.0)

    place = np.random.default_rng(0).permutation(10)  # of each page
    pages = jax.tree.map(lambda pool: jnp.zeros_like(pool).at[place].set(pool), cache.pages)
    table = place.reshape(2, 5)
    table[1, 0] = table[0, 0]
    assert cache.statistics is not None
    found = attend_paged(
        q[:, :5], pages, (cache.key_quantizer, cache.value_quantizer), jnp.asarray(table, jnp.int32), lengths, counts,
        options=LogitOptions(D**-0.5, 4.0), statistics=(cache.statistics.mean, cache.statistics.weight),
        sink_logits=sinks,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
