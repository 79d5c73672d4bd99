"""Codes do not depend on the tokens that are encoded beside them: equal keys and values are equal bytes."""

import itertools

import jax
import pytest

torch = pytest.importorskip("torch")

import tq_jax as tq  # noqa: E402
from interop.torch import jax_calls  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402

TOKENS = 256
SHAPES = [(1, 64), (3, 64), (5, 96), (8, 128)]
"""KV heads and channels. Products of XLA give other last bits for other numbers of rows with some of these shapes."""


def cuts(size, first=0):
    """Bounds of batches of this size, after a first one of another size."""
    edges = sorted({0, first, *range(first, TOKENS, size), TOKENS})
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("kind", ["mse", "prod"])
def test_codes_of_any_batch(heads, dim, kind):
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(TOKENS, heads, dim, generator=random) for _ in range(2))
    key = tq.QuantizerSpec(dim, 4, kind=kind)
    quantizers = tq.make_quantizer(key), tq.make_quantizer(tq.QuantizerSpec(dim, 3), seed=1)

    def encode(batches):
        codes = [jax_calls.encode_tokens(*quantizers, keys[a:b], values[a:b]) for a, b in batches]
        return [torch.cat(parts) for parts in zip(*map(jax.tree.leaves, codes), strict=True)]

    whole = encode([(0, TOKENS)])
    for batches in (cuts(1), cuts(2), cuts(3), cuts(7), cuts(16), cuts(33), cuts(100), cuts(64, first=5)):
        assert all(torch.equal(*pair) for pair in zip(encode(batches), whole, strict=True))


@pytest.mark.parametrize(("heads", "dim"), SHAPES[2:])
def test_bytes_of_a_prefix_in_chunks(heads, dim):
    """Without a window and statistics, whose extent depends on the first chunk, caches are equal to the bit."""
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, TOKENS, heads, dim, generator=random)
    spec = tq.CacheSpec.recommended(
        heads, dim, TOKENS, window=0, sink_tokens=0, center_keys=False, smooth_keys=False, dtype="float32"
    )
    found = []
    for batches in (cuts(TOKENS), cuts(3), cuts(50, first=1)):
        cache = TorchCache(spec, 1)
        for a, b in batches:
            cache.append(keys[:, a:b], values[:, a:b])
        found.append([x for x in jax.tree.leaves(cache.arrays.pages) if isinstance(x, torch.Tensor)])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, found[0], strict=True))
