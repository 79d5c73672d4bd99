"""Decoders over several devices give what one device gives, and only small arrays cross between devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tq_jax as tq
from tq_jax.models import Decoder, DecoderConfig, Sampling, generate
from tq_jax.models.generate import decode_loop
from tq_jax.models.mesh_step import run_on_mesh
from tq_jax.models.sharding import (
    Layout,
    MeshAxes,
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


CASES = [(mesh, "exact") for mesh in MESHES]
CASES += [pytest.param(mesh, "packed", marks=pytest.mark.slow) for mesh in MESHES if "order" not in mesh]


@pytest.mark.sampled
@pytest.mark.parametrize(("mesh", "spec"), CASES)
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


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "spec", "turn"), [("2 x 2", "packed", 3), ("2 x 2", "exact", 11), ("2 heads", "exact", 3)]
)
def test_goes_on_behind_a_cache(decoder, ragged, alone, mesh, spec, turn):
    """A second prompt attends over the cache of a mesh as over that of one device; chunks are short and long."""
    tokens = jnp.asarray(np.random.default_rng(turn).integers(0, CONFIG.vocab_size, (3, turn), dtype=np.int32))
    lengths, options = jnp.asarray([turn, turn - 1, 1], jnp.int32), {"max_new_tokens": 6}
    where = mesh_of(mesh)
    first = generate(decoder, *ragged, cache_spec=SPECS[spec], max_new_tokens=NEW, mesh=where)
    expected = generate(decoder, tokens, lengths, cache=alone[spec].cache, **options)
    for _ in range(2):  # the cache is copied, not changed
        found = generate(decoder, tokens, lengths, cache=first.cache, mesh=where, **options)
        assert found.sequences() == expected.sequences()


@pytest.mark.slow
def test_prompts_in_chunks(decoder, ragged):
    options = {"cache_spec": EXACT, "max_new_tokens": 4, "prompt_chunk": 32}
    one, many = (generate(decoder, *ragged, mesh=mesh, **options) for mesh in (None, mesh_of("2 x 2")))
    assert one.sequences() == many.sequences()


def test_goes_on_behind_the_cache_of_one_device(decoder, ragged, alone):
    """Spread by heads, a cache has the arrays of one device, which move to where they belong."""
    tokens, lengths = ragged[0][:, :3], jnp.asarray([3, 2, 1], jnp.int32)
    one, many = (
        generate(decoder, tokens, lengths, cache=alone["exact"].cache, max_new_tokens=4, mesh=mesh)
        for mesh in (None, mesh_of("4 heads"))
    )
    assert one.sequences() == many.sequences()


def loop_on(mesh: jax.sharding.Mesh, decoder: Decoder, spec: tq.CacheSpec):
    """The compiled loop of decoding on a mesh, and its arguments."""
    layout = Layout(mesh)
    arrays = {
        "first": jnp.ones(1, jnp.int32),
        "keys": jax.random.split(jax.random.key(0), 1),
        "stop": jnp.zeros(0, int),
    }
    arguments = (
        shard(decoder, mesh),
        init_cache(decoder, spec, batch=1, mesh=mesh),
        {name: place(array, layout.named()) for name, array in arrays.items()},
    )
    options = (("sampling", Sampling()), ("implementation", "auto"), ("max_new_tokens", 4))
    run = functools.partial(run_on_mesh, step=decode_loop, layout=layout, options=options)
    return jax.jit(run, donate_argnums=1).lower(*arguments).compile(), arguments


def crossing(hlo: str) -> dict[str, int]:
    """The kinds of communication of a compiled program, and the most numbers that each of them moves."""
    found: dict[str, int] = {}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    for shapes, kind in re.findall(rf"= ([^=]*?) ({kinds})[\w-]*\(", hlo):
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes):
            found[kind] = max(found.get(kind, 0), math.prod(int(n) for n in shape.split(",") if n))
    return found


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "spec"), [("4 heads", "packed"), ("4 shares", "packed"), ("2 x 2", "packed"), ("2 x 2", "exact")]
)
def test_only_small_arrays_cross(decoder, mesh, spec):
    """No weight and no part of a cache crosses between devices, and the donated cache is updated in place."""
    loop, (placed, cache, arrays) = loop_on(mesh_of(mesh), decoder, SPECS[spec])
    # The logits of one token are gathered; what is reduced has the size of its queries or hidden states.
    logits = {} if mesh == "4 shares" else {"all-gather": CONFIG.vocab_size}
    assert crossing(loop.as_text()) == {**logits, "all-reduce": pytest.approx(100, abs=80)}
    before = pointers(cache)
    *_, after = loop(placed, cache, arrays)
    assert cache.exact_keys.is_deleted()
    assert pointers(after) == before


def pointers(cache: tq.Cache) -> list[int]:
    """Addresses of the parts of everything that has KV heads and tokens."""
    arrays = jax.tree.leaves((cache.pages, cache.exact_keys, cache.exact_values))
    return [part.data.unsafe_buffer_pointer() for x in arrays for part in x.addressable_shards]


def test_every_device_holds_its_part(decoder):
    """Weights and cache are split, not copied: of what has heads, each of four devices holds a quarter."""
    mesh = mesh_of("4 heads")
    placed, whole = shard(decoder, mesh), 0
    for x in jax.tree.leaves(placed):
        parts = [part.data.size for part in x.addressable_shards]
        assert len(parts) == 4
        assert len(set(parts)) == 1
        if parts[0] == x.size:
            whole += x.size
        else:
            assert 4 * parts[0] == x.size
    assert whole == (2 * CONFIG.num_layers + 1) * CONFIG.dim  # norms
    assert shard(placed, mesh).head.kernel[...] is placed.head.kernel[...]
    cache = init_cache(decoder, PACKED, batch=3, mesh=mesh)
    assert cache.spec == PACKED
    for x in jax.tree.leaves((cache.pages, cache.exact_keys, cache.exact_values, cache.statistics.mean)):
        assert [part.data.shape[1] for part in x.addressable_shards] == [1] * 4
    alone = decoder.init_cache(PACKED, batch=3)
    jax.tree.map(np.testing.assert_array_equal, cache, alone)
    shares = init_cache(decoder, PACKED, batch=3, mesh=mesh_of("4 shares"))
    assert (shares.spec.max_tokens, shares.spec.window, shares.spec.sink_tokens) == (24, 2, 1)
    assert shares.rows == 4 * alone.rows
    for x in jax.tree.leaves((shares.pages, shares.exact_keys, shares.length)):
        assert [4 * part.data.shape[0] for part in x.addressable_shards] == [x.shape[0]] * 4


def test_shardings_by_name(decoder):
    mesh = jax.make_mesh((2, 2), ("tp", "cp"))
    axes = MeshAxes(heads="tp", sequence="cp")
    abstract = nnx.eval_shape(lambda: Decoder(dataclasses.replace(CONFIG, architecture="qwen2"), rngs=nnx.Rngs(0)))
    found = decoder_shardings(abstract, mesh, axes=axes)
    block = found.blocks[0]
    specs = {
        "qkv": block.attention.qkv.kernel, "bias": block.attention.qkv.bias, "output": block.attention.output.kernel,
        "gate_up": block.mlp.gate_up.kernel, "down": block.mlp.down.kernel, "norm": block.mlp_norm.scale,
        "embedding": found.embedding.embedding, "head": found.head.kernel,
    }  # fmt: skip
    assert {name: tuple(x.get_value().spec) for name, x in specs.items()} == {
        "qkv": (None, "tp"), "bias": (None, "tp"), "output": (None, None, "tp"), "gate_up": (None, None, "tp"),
        "down": (None, None, "tp"), "norm": (), "embedding": ("tp",), "head": ("tp",),
    }  # fmt: skip
    cache = cache_shardings(jax.eval_shape(lambda: tq.init_cache(PACKED, 2)), mesh, axes=axes)
    assert tuple(cache.pages.keys.packed.spec) == tuple(cache.statistics.weight.spec) == ("cp", "tp")
    assert tuple(cache.length.spec) == tuple(cache.statistics.ready.spec) == ("cp",)
    assert {x.spec for x in jax.tree.leaves(cache.key_quantizer)} == {jax.P()}


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "unroll", "chunk"),
    [
        ({"architecture": "qwen2", "vocab_size": 301}, False, 64),  # biases; a vocabulary that is on every device
        ({"architecture": "qwen3", "tied_head": True}, True, 32),  # head norms; a run of its own for every layer
        ({"architecture": "gemma3", "sliding_window": 12, "local_layers": (True, False)}, False, 64),
        # The kernels of every expert are spread; prompts take tiles of rows, single tokens an expert per row.
        ({"architecture": "qwen3_moe", "num_experts": 8, "experts_per_token": 2}, False, 64),
    ],
    ids=["qwen2", "qwen3", "gemma3", "qwen3_moe"],
)
def test_families(ragged, fields, unroll, chunk):
    decoder = Decoder(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0), unroll=unroll)
    options = {"cache_spec": EXACT, "max_new_tokens": 6, "prompt_chunk": chunk}
    alone, found = (generate(decoder, *ragged, mesh=mesh, **options) for mesh in (None, mesh_of("2 heads")))
    assert found.sequences() == alone.sequences()


@pytest.mark.slow
def test_sampling_and_stop_tokens(decoder, ragged, alone):
    options = {"cache_spec": EXACT, "max_new_tokens": 6, "stop_tokens": [alone["exact"].sequences()[0][2]]}
    options |= {"sampling": Sampling(temperature=0.8), "key": jax.random.key(3)}
    one, many = (generate(decoder, *ragged, mesh=mesh, **options) for mesh in (None, mesh_of("2 x 2")))
    assert one.sequences() == many.sequences()


@pytest.mark.parametrize(
    ("change", "mesh", "message"),
    [
        ({"num_kv_heads": 2}, "4 heads", r"mesh axis 'heads': sizes that divide num_kv_heads=2 are supported, got 4"),
        ({"ffn_dim": 81}, "2 heads", r"mesh axis 'heads': sizes that divide ffn_dim=81 are supported, got 2"),
        (
            {"sliding_window": 12},
            "2 shares",
            r"mesh axis 'sequence': with a sliding window, which is 12 tokens here, size 1 is supported, got 2",
        ),
        (
            {"attention_softcap": 50.0},
            "2 shares",
            r"mesh axis 'sequence': with a soft-cap of attention scores, which is 50.0 here, size 1 is supported",
        ),
        ({"architecture": "olmo2"}, "2 heads", r"mesh axis 'heads': for olmo2 decoders size 1 is supported, got 2"),
        (
            {"architecture": "gpt_oss", "num_experts": 4, "experts_per_token": 2},
            "2 heads",
            r"mesh axis 'heads': for gpt_oss decoders size 1 is supported, got 2",
        ),
    ],
)
def test_refuses_by_name(change, mesh, message):
    config = dataclasses.replace(CONFIG, **change)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    spec = dataclasses.replace(EXACT, num_kv_heads=config.num_kv_heads)
    for call in (
        lambda: decoder_shardings(abstract, mesh_of(mesh)),
        lambda: init_cache(abstract, spec, batch=1, mesh=mesh_of(mesh)),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()


def test_refuses_misuse(decoder, ragged, alone):
    with pytest.raises(ValueError, match=r"mesh: expected axes among \('heads', 'sequence'\), got \('data',\)"):
        shard(decoder, jax.make_mesh((2,), ("data",)))
    with pytest.raises(ValueError, match=r"expected 12 rows \(2 layers x 6 sequences\), got 6"):
        generate(decoder, *ragged, cache=alone["exact"].cache, max_new_tokens=1, mesh=mesh_of("2 shares"))
    with pytest.raises(ValueError, match=r"cache_spec.max_tokens: expected room for 97 tokens"):
        generate(decoder, *ragged, cache_spec=EXACT, max_new_tokens=37, mesh=mesh_of("2 shares"))
