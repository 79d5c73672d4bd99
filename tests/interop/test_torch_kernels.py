"""Launches read off lowered functions, which needs no GPU; that they compute the same is measured on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tq_jax as tq  # noqa: E402
from interop import compute  # noqa: E402
from interop.split import split_constants  # noqa: E402
from interop.torch_attend import AttendOptions, KernelAttention, kernel_arrays  # noqa: E402
from interop.torch_attend import _Static as StaticAttend  # noqa: E402
from interop.torch_cache import TorchCache  # noqa: E402
from interop.torch_encode import _Static as StaticEncode  # noqa: E402
from interop.torch_kernels import Place, _struct, plan_launches  # noqa: E402
from tq_jax.quantizer import encoder  # noqa: E402

SPEC = tq.CacheSpec(2, 64, 512, tq.QuantizerSpec(64, 3, kind="prod"), tq.QuantizerSpec(64, 4))


def shapes(tree):
    return jax.tree.map(_struct, tree)


@pytest.fixture(scope="module")
def cache():
    return TorchCache(SPEC, 2)


def test_attention_is_three_launches(cache):
    """Prepare, decode, merge: only the output is new, all between lies in the workspace, every tensor is read."""
    query = torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16)
    arrays = kernel_arrays(cache.arrays)
    plan = plan_launches(StaticAttend(SPEC, AttendOptions()), shapes(query), shapes(arrays), None, None)
    assert [launch.kernel.name for launch in plan.launches] == ["prepare", "decode", "merge"]
    assert plan.outputs == (Place("output", 0),) and plan.made == (((2, 1, 4, 64), "bfloat16"),)
    read = {place.index for launch in plan.launches for place in launch.arguments if place.kind == "input"}
    assert read == set(range(len(plan.inputs)))
    assert len(plan.inputs) == 1 + len(jax.tree.leaves(arrays))
    places = [place for launch in plan.launches for place in launch.arguments if place.kind == "workspace"]
    assert all(place.index % 256 == 0 and place.index < plan.workspace for place in places)
    # What one kernel writes the next one reads.
    first, second = ({p for p in launch.arguments if p.kind == "workspace"} for launch in plan.launches[:2])
    assert first & second
    assert arrays.exact_keys.data_ptr() == cache.arrays.exact_keys.data_ptr()
    assert arrays.exact_keys.dtype == torch.uint16


def test_long_chunks_go_block_by_block(monkeypatch):
    """Blocks of queries say how many there are to the end; here what a block gives is JAX's."""
    small = TorchCache(SPEC, 2)
    small.append(*torch.randn(2, 2, 40, 2, 64, generator=torch.Generator().manual_seed(0)), lengths=[40, 25])
    query = torch.randn(2, 19, 4, 64)

    def launch(self, query, options, sink_logits, counts):
        return compute.attend(query, small.as_jax(), lengths=counts)

    monkeypatch.setattr(KernelAttention, "_launch", launch)
    for lengths in ([19, 19], [19, 3]):
        counts = torch.tensor(lengths, dtype=torch.int32)
        found = KernelAttention(small.arrays)(query, AttendOptions(), counts=counts)
        torch.testing.assert_close(found, small.attend(query, lengths=lengths), rtol=0, atol=1e-6)


def test_encoding_writes_the_pools_in_place(cache):
    quantizers = tq.make_quantizer(SPEC.key), tq.make_quantizer(SPEC.value, seed=1)
    tokens, slots = torch.zeros(4, 1, 2, 64, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.int32)
    given = torch.zeros(4, 2, 64)
    function = StaticEncode(tuple(encoder(q) for q in quantizers))
    plan = plan_launches(function, *map(shapes, (tokens, tokens, cache.arrays.pages, slots, given, given)))
    assert [launch.kernel.name for launch in plan.launches] == ["encode", "encode"]
    assert plan.made == () and plan.workspace == 0
    assert plan.outputs == tuple(Place("input", 2 + i) for i in range(len(jax.tree.leaves(cache.arrays.pages))))
    assert function == StaticEncode(tuple(encoder(q) for q in quantizers))
    other = tq.make_quantizer(SPEC.key, seed=5)
    assert function != StaticEncode((encoder(other), encoder(quantizers[1])))


def test_anything_but_kernels_is_refused():
    with pytest.raises(NotImplementedError, match="only launches kernels, got stablehlo.add"):
        plan_launches(lambda x: (x + x,), jax.ShapeDtypeStruct((3,), jnp.float32))


def test_constants_are_computed_beforehand():
    table = jnp.arange(8.0)
    double = functools.partial(jax.jit(lambda t: t * 2))

    def function(x, unused):
        return {"y": x * jnp.sum(double(table)), "x": x}

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    split = split_constants(function, shape, shape)
    assert [value.tolist() for value in split.values] == [56.0] and split.used == [0]
    np.testing.assert_array_equal(split.function([jnp.float32(56), jnp.float32(3)]), [3.0, 168.0])
