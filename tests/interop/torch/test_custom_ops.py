import pytest

torch = pytest.importorskip("torch")

import tq_jax as tq  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402

FOUR = tq.QuantizerSpec(32, 4)
SPEC = tq.CacheSpec(2, 32, 64, FOUR, FOUR, window=8, smooth_keys=False, center_keys=False, page_size=16)


def test_a_compiled_step_is_one_graph():
    """Appends and attention inside torch.compile: no graph breaks, and what eager gives."""
    generator = torch.Generator().manual_seed(0)
    eager, compiled = TorchCache(SPEC, 1), TorchCache(SPEC, 1)

    def step(cache, k, v, q):
        cache.append(k, v)
        return cache.attend(2 * q, scale=0.2) + 1

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(14):
        k, v = torch.randn(2, 1, 1, 2, 32, generator=generator)
        q = torch.randn(1, 1, 4, 32, generator=generator)
        assert torch.equal(run(compiled, k, v, q), step(eager, k, v, q))
    assert compiled.lengths == (14,) and compiled.compressed == (2,)


def test_the_fake_attention_is_like_the_real_one():
    cache = TorchCache(SPEC, 1)
    cache.append(torch.ones(1, 14, 2, 32), torch.ones(1, 14, 2, 32))
    query = torch.ones(1, 1, 4, 32)
    arguments = (query, cache._version, cache._number, None, None, None, None, None, False)
    torch.library.opcheck(torch.ops.tq_jax.attend, arguments, test_utils=("test_schema", "test_faketensor"))
