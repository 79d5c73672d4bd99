"""Decoders over several devices give what one device gives, and only small arrays cross between devices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tq_jax as tq
from tq_jax.models import Decoder, DecoderConfig, Sampling, generate
from tq_jax.models.generate import decode_loop
from tq_jax.models.sharding import (
    Layout,
    MeshAxes,
    _donating,
    cache_shardings,
    decoder_shardings,
    init_cache,
    place,
    shard,
)

CONFIG = DecoderConfig(
    vocab_size=300, dim=48, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16, ffn_dim=80, max_context=512
)
NEW = 14
MESHES = {
    "2 heads": ((2,), ("heads",)),
    "4 heads": ((4,), ("heads",)),
    "2 shares": ((2,), ("sequence",)),
    "4 shares": ((4,), ("sequence",)),
    "2 x 2": ((2, 2), ("heads", "sequence")),
    "2 x 2, other order": ((2, 2), ("sequence", "heads")),
}
EXACT = tq.CacheSpec.full_precision(num_kv_heads=4, head_dim=16, max_tokens=96, dtype="float32")
PACKED = tq.CacheSpec.recommended(
    4, 16, max_tokens=96, key_bits=8, value_bits=8, window=8, page_size=16, dtype="float32"
)  # fmt: skip
SPECS = {"exact": EXACT, "packed": PACKED}


def mesh_of(name: str) -> jax.sharding.Mesh:
    shape, axes = MESHES[name]
    return jax.make_mesh(shape, axes, devices=jax.devices()[: int(np.prod(shape))])


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def ragged() -> tuple[jax.Array, jax.Array]:
    """Three right-padded prompts; the last one is long enough for statistics of its keys on each of four devices."""
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 61), dtype=np.int32)
    return jnp.asarray(tokens), jnp.asarray([23, 1, 61], jnp.int32)


@pytest.fixture(scope="module")
def alone(decoder, ragged) -> dict:
    """What one device generates."""
    return {name: generate(decoder, *ragged, cache_spec=spec, max_new_tokens=NEW) for name, spec in SPECS.items()}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mesh", MESHES)
def test_tokens_are_those_of_one_device(decoder, ragged, alone, mesh, spec):
    found = generate(decoder, *ragged, cache_spec=SPECS[spec], max_new_tokens=NEW, mesh=mesh_of(mesh))
    assert found.sequences() == alone[spec].sequences()
    shares = Layout(mesh_of(mesh)).shares
    for name in ("length", "compressed"):
        counts = getattr(found.cache, name).reshape(shares, -1)
        np.testing.assert_array_equal(counts.sum(0), getattr(alone[spec].cache, name))
        assert int(jnp.max(jnp.ptp(counts, axis=0))) <= 1 + (name == "compressed")
    if spec == "packed":
        assert int(found.cache.compressed.min(initial=99, where=found.cache.length > 20)) > 0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mesh", ["4 heads", "4 shares", "2 x 2"])
def test_goes_on_behind_a_cache(decoder, ragged, mesh, spec):
    """A second prompt attends over the cache of a mesh as over that of one device; chunks are short and long."""
    for turn in (3, 11):
        tokens = jnp.asarray(np.random.default_rng(turn).integers(0, CONFIG.vocab_size, (3, turn), dtype=np.int32))
        lengths, found = jnp.asarray([turn, turn - 1, 1], jnp.int32), []
        for where in (None, mesh_of(mesh)):
            first = generate(decoder, *ragged, cache_spec=SPECS[spec], max_new_tokens=4, mesh=where)
            for _ in range(2):  # the cache is copied, not changed
                found.append(generate(decoder, tokens, lengths, cache=first.cache, max_new_tokens=6, mesh=where))
        assert len({str(generation.sequences()) for generation in found}) == 1


def lowered(decoder: Decoder, mesh: jax.sharding.Mesh, spec: tq.CacheSpec):
    """The compiled loop of decoding on a mesh, and its cache."""
    layout = Layout(mesh)
    cache = init_cache(decoder, spec, batch=1, mesh=mesh)
    arrays = {"first": jnp.ones(1, jnp.int32), "keys": jax.random.split(jax.random.key(0), 1), "stop": jnp.zeros(0, int)}
    arrays = {name: place(array, layout.named()) for name, array in arrays.items()}
    options = {"sampling": Sampling(), "implementation": "auto", "max_new_tokens": 4}
    static = {"step": decode_loop, "layout": layout, "options": tuple(options.items())}
    return _donating.lower(shard(decoder, mesh), cache, arrays, **static).compile(), cache, arrays


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mesh", ["4 heads", "4 shares", "2 x 2"])
def test_only_small_arrays_cross(decoder, mesh, spec):
    """No weight and no part of a cache is gathered, and the donated cache is updated in place."""
    compiled, cache, _ = lowered(decoder, mesh_of(mesh), SPECS[spec])
    crossing = re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\(",
                          compiled.as_text())  # fmt: skip
    assert crossing
    sizes = [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for shapes, _ in crossing
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]
    assert max(sizes) <= CONFIG.vocab_size  # the logits of one token; queries and hidden states are smaller
    assert {kind for _, kind in crossing} <= {"all-gather", "all-reduce"}
    aliased = sum(x.nbytes for x in jax.tree.leaves(cache)) // mesh_of(mesh).size
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.9 * aliased


def pointers(cache: tq.Cache) -> list[int]:
    arrays = [x for x in jax.tree.leaves((cache.pages, cache.exact_keys, cache.exact_values)) if x is not None]
    return [part.data.unsafe_buffer_pointer() for x in arrays for part in x.addressable_shards]
