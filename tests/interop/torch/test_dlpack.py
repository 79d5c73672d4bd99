import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tq_jax as tq  # noqa: E402
from interop.torch.dlpack import to_jax, to_torch  # noqa: E402

SPECS = {
    "mse4": tq.QuantizerSpec(64, 4),
    "prod3-haar": tq.QuantizerSpec(64, 3, kind="prod", rotation="haar"),
    "mse2.5": tq.QuantizerSpec(64, 2.5, scale_dtype="float32"),
}


def make_cache(dtype: str, key: str) -> tq.Cache:
    """A cache of random bytes: nothing is computed here that would have to be compiled."""
    value = tq.QuantizerSpec(64, 2, kind="group")
    cache = tq.init_cache(tq.CacheSpec(2, 64, 200, SPECS[key], value, page_size=16, dtype=dtype), batch=2)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 2, x.shape).astype(x.dtype)), cache)


def pointers(tree) -> list[int]:
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("key", "dtype"), list(zip(SPECS, ("bfloat16", "float16", "float32"), strict=True)))
def test_a_cache_there_and_back(key, dtype):
    cache = make_cache(dtype, key)
    tensors = to_torch(cache)
    back = to_jax(tensors)
    assert pointers(cache) == pointers(tensors) == pointers(back)
    assert jax.tree.structure(cache) == jax.tree.structure(back)
    assert tensors.exact_keys.dtype == getattr(torch, dtype)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(back), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_codes_inside_other_containers():
    q = tq.make_quantizer(SPECS["prod3-haar"], seed=3)
    tree = {"code": tq.quantize(q, jnp.ones((5, 64))), "pair": (q, None)}
    tensors = to_torch(tree)
    assert tensors["code"].packed.dtype == torch.uint8 and tensors["pair"][1] is None
    back = to_jax(tensors)
    np.testing.assert_array_equal(tq.dequantize(back["pair"][0], back["code"]), tq.dequantize(q, tree["code"]))


def test_the_same_seed_gives_the_same_bytes():
    one, two = to_torch(tq.make_quantizer(SPECS["prod3-haar"], seed=7)), tq.make_quantizer(SPECS["prod3-haar"], seed=7)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert ours.numpy().tobytes() == np.asarray(theirs).tobytes()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    theirs = tq.quantize(two, jnp.asarray(x.numpy()))
    ours = to_torch(tq.quantize(to_jax(one), to_jax(x)))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.numpy().tobytes() == np.asarray(b).tobytes()


def test_an_import_sees_what_torch_writes_and_outlives_the_tensor():
    tensor = torch.zeros(64)
    array = to_jax(tensor)
    tensor[3] = 5.0
    assert float(jnp.sum(array)) == 5.0
    tensor.mul_(2)
    del tensor
    assert float(jnp.sum(array)) == 10.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8", "int8", "int32", "bool", "uint16"])
def test_types_and_layouts(dtype):
    tensor = torch.arange(64 * 6).reshape(4, 16, 6).to(getattr(torch, dtype))
    for view in (tensor, tensor.permute(2, 0, 1), tensor[2:], tensor[:, :0], tensor[:1, :1, 0].squeeze()):
        array = to_jax(view)
        assert array.shape == tuple(view.shape)
        as_float = view.to(torch.float32).numpy()
        np.testing.assert_array_equal(np.asarray(array).astype(np.float32), as_float)


def test_what_cannot_be_shared():
    base = torch.zeros(128, 64)
    cases = [
        (ValueError, "expected torch tensors, got ndarray", np.zeros(3)),
        (ValueError, r"torch.int64\[2\], which it narrows: convert to int32", torch.tensor([1, 2**33 + 5])),
        (ValueError, r"torch.float64\[3\], which it narrows: convert to float32", torch.zeros(3, dtype=torch.float64)),
        (ValueError, r"need no gradient, got torch.float32\[3\]: detach", torch.zeros(3, requires_grad=True)),
        (ValueError, r"without gaps or overlaps, got torch.float32\[128, 32\] with strides \(64, 1\)", base[:, :32]),
        (ValueError, r"without gaps or overlaps, got torch.float32\[64, 64\] with strides \(128, 1\)", base[::2]),
        (ValueError, r"without gaps or overlaps, .* with strides \(0, 1\)", torch.zeros(1, 8).expand(4, 8)),
        (ValueError, r"aligned to 64 bytes, got torch.float32\[99\] at offset 4: clone", torch.zeros(100)[1:]),
        (ValueError, r"without lazy conjugation, got torch.complex64\[2\]", torch.zeros(2, dtype=torch.cfloat).conj()),
        (ValueError, "dense tensors without lazy", torch.zeros(2, 2).to_sparse()),
        (NotImplementedError, r"JAX cannot share a tensor of torch.float32\[3\]: ", torch.zeros(3, device="meta")),
    ]
    for error, message, value in cases:
        with pytest.raises(error, match=message):
            to_jax({"x": value})


def test_what_cannot_be_exported():
    gone = jnp.ones(3)
    gone.delete()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(jnp.ones(4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    cases = [
        (ValueError, "expected JAX arrays with values, got ndarray", np.zeros(3)),
        (ValueError, r"got a deleted \(donated\?\) one of shape \(3,\)", gone),
        (ValueError, "expected arrays on one device, got one on 2", spread),
        (NotImplementedError, "at least 8 bits, got int4", jnp.ones(4, jnp.int4)),
        (NotImplementedError, "DLPack carries numbers, got key", jax.random.key(0)),
    ]
    for error, message, value in cases:
        with pytest.raises(error, match=message):
            to_torch(value)
    with pytest.raises(ValueError, match="expected JAX arrays with values, got "):
        jax.jit(to_torch)(jnp.ones(3))


def test_donating_an_import_leaves_the_tensor_alone():
    """Donation does as the docstring says: no update in place, no error."""
    tensor = torch.zeros(64)
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(to_jax(tensor))
    assert float(result[0]) == 1.0 and not tensor.any()


def test_a_full_precision_cache():
    cache = tq.init_cache(tq.CacheSpec.full_precision(num_kv_heads=1, head_dim=64, max_tokens=8), batch=1)
    tensors = to_torch(cache)
    assert tensors.pages is None and tensors.exact_values.dtype == torch.bfloat16
    assert dataclasses.asdict(to_jax(tensors).spec) == dataclasses.asdict(cache.spec)
