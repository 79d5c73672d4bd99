"""Launches read off lowered functions and what torch runs between them, which needs no GPU.

Where kernels have to run they are interpreted by JAX; that a GPU computes the same is measured on one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from interpreted import Interpreted, record_launches  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.launcher import program  # noqa: E402
from interop.launcher.constants import split_constants  # noqa: E402
from interop.launcher.function import TorchFunction  # noqa: E402
from interop.launcher.launches import ArrayPlace, plan_launches  # noqa: E402
from interop.launcher.program import BoundProgram, struct  # noqa: E402
from interop.torch import append_on_gpu, attend_on_gpu  # noqa: E402
from interop.torch.append_on_gpu import KernelAppend  # noqa: E402
from interop.torch.attend_on_gpu import AttendOptions, KernelAttention, kernel_arrays, padded_size  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402
from interop.torch.dlpack import to_torch  # noqa: E402

SPEC = tq.CacheSpec(2, 64, 512, tq.QuantizerSpec(64, 3, kind="prod"), tq.QuantizerSpec(64, 4))
SMALL = tq.CacheSpec(2, 64, 64, tq.QuantizerSpec(64, 4), tq.QuantizerSpec(64, 4), window=10, page_size=32)


@pytest.fixture(scope="module")
def cache():
    return TorchCache(SPEC, 2)


def tokens(count, seed):
    """Keys, values and queries of two rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, count, heads, 64, generator=generator).bfloat16() for heads in (2, 2, 6)]


def test_attention_is_three_launches(cache):
    """Prepare, decode, merge: only the output is new, all between lies in the workspace, every tensor is read."""
    query = struct(torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16))
    arrays = kernel_arrays(cache.arrays)
    function = attend_on_gpu._Static(SPEC, AttendOptions())
    plan = plan_launches(function, jax.tree.map(struct, arrays), query, None, None)
    assert [launch.kernel.name for launch in plan.launches] == ["prepare", "decode", "merge"]
    assert plan.outputs == (ArrayPlace("output", 0),) and plan.made == (((2, 1, 4, 64), "bfloat16"),)
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


def test_appending_is_three_launches_in_place(cache, monkeypatch):
    """Every array of the cache is written where it lies; what leaves the window passes through the workspace."""
    made = []
    monkeypatch.setattr(program, "TorchProgram", lambda *given, device: made.append(given))
    k, v, _ = tokens(1, 0)
    with pytest.raises(AttributeError):
        KernelAppend(cache.arrays)(k, v)
    [(function, *examples)] = made
    plan = plan_launches(function, *jax.tree.map(struct, examples))
    assert [launch.kernel.name for launch in plan.launches] == ["leave", "encode", "enter"]
    assert plan.made == () and plan.workspace > 0
    written = {place.index for place in plan.outputs if place.kind == "input"}
    assert written == set(range(len(jax.tree.leaves(examples[0]))))
    again = KernelAppend(TorchCache(SPEC, 2).arrays)._program._function
    assert function == again and hash(function) == hash(again)
    assert function != KernelAppend(TorchCache(SPEC, 2, seed=5).arrays)._program._function


def test_appending_gives_the_bytes_of_the_cpu(interpreted):
    """Chunks padded to powers of two, ragged, cut into parts; statistics are read where they lie."""
    want, found = TorchCache(SMALL, 2), TorchCache(SMALL, 2)
    for one in (want, found):
        one.append(*tokens(40, 0)[:2], lengths=[40, 17])
    append, made = KernelAppend(found.arrays), Interpreted.made
    for seed, (count, counts) in enumerate([(1, None), (3, [3, 0]), (11, [7, 11]), (1, None)], 1):
        k, v, _ = tokens(count, seed)
        want.append(k, v, lengths=counts)
        append(k, v, None if counts is None else torch.tensor(counts, dtype=torch.int32))
        for (name, a), b in zip(
            jax.tree_util.tree_leaves_with_path(found.arrays), jax.tree.leaves(want.arrays), strict=True
        ):
            assert torch.equal(a, b), name
    assert Interpreted.made == made + 3


def test_long_prompts_are_appended_in_parts(interpreted, monkeypatch):
    monkeypatch.setattr(append_on_gpu, "LONGEST", 16)
    want, found = (TorchCache(SMALL, 2, statistics=(jnp.zeros((2, 64)), jnp.ones((2, 64)))) for _ in range(2))
    k, v, _ = tokens(40, 0)
    want.append(k, v, lengths=[40, 20])
    KernelAppend(found.arrays)(k, v, torch.tensor([40, 20], dtype=torch.int32))
    for a, b in zip(jax.tree.leaves(found.arrays), jax.tree.leaves(want.arrays), strict=True):
        assert torch.equal(a, b)


def test_long_chunks_are_attended_to_as_by_jax(interpreted, monkeypatch):
    """Kernels, what torch computes between them, blocks of queries, padding and sinks, against the reference."""
    monkeypatch.setattr(attend_on_gpu, "LONGEST", 16)
    cache = TorchCache(dataclasses.replace(SMALL, page_size=64), 2)
    k, v, query = tokens(40, 0)
    cache.append(k, v, query=query, lengths=[40, 25])
    query, sinks, static = query[:, -19:].float(), torch.linspace(-1, 3, 6), {"sliding_window": 20, "softcap": 3.0}
    attention = KernelAttention(cache.arrays)
    for lengths in ([19, 19], [19, 3]):
        want = cache.attend(query, lengths=lengths, sink_logits=sinks, **static)
        counts = None if lengths[1] == 19 else torch.tensor(lengths, dtype=torch.int32)
        found = attention(query, AttendOptions(**static), sinks, counts)
        assert found.shape == want.shape
        assert float((found - want).norm() / want.norm()) < 2e-3


def test_what_kernels_cannot_tell_is_checked(cache, monkeypatch):
    """They would read where nothing is."""
    launched = record_launches(monkeypatch)
    attention, query = KernelAttention(cache.arrays), torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16)
    cases = [
        (r"expected query of shape \(2, tokens, a multiple of 2, 64\), got \(1, 1, 4, 64\)", query[:1], {}, None),
        (r"expected query of shape .*, got \(2, 1, 3, 64\)", query[:, :, 1:], {}, None),
        (r"expected sink_logits of shape \(4,\), got \(2,\)", query, {}, torch.zeros(2)),
        ("expected softcap above 0, got -1.0", query, dict(softcap=-1.0), None),
        ("expected sliding_window above 0, got 0", query, dict(sliding_window=0), None),
        ("expected scale above 0, got 0", query, dict(scale=0.0), None),
    ]
    for message, given, options, sinks in cases:
        with pytest.raises(ValueError, match=message):
            attention(given, AttendOptions(**options), sinks)
    assert attention(query[:, :0], AttendOptions()).shape == (2, 0, 4, 64)
    assert not launched


def test_sizes_of_padded_chunks():
    assert [padded_size(n) for n in (9, 16, 33, 65, 100, 700, 1000, 1024)] == [16, 16, 48, 80, 112, 768, 1024, 1024]


def test_operations_between_kernels():
    """Torch runs operations, functions that are called twice, and constants."""
    table = jnp.arange(6.0).reshape(2, 3)

    @jax.jit
    def soft(x):
        top = jnp.max(x, axis=1, keepdims=True)
        return jnp.where(x > 0.5, jnp.exp2(x - top), jnp.minimum(jnp.abs(x), 2.0))

    def forward(x, unused):
        y = soft(x) + soft(2 * x[:, :3] + table)
        return jnp.concatenate([y.T / 3, jnp.log2(y.T + 1)], axis=1).astype(jnp.float16), jnp.sum(y, axis=0) < 2

    def backward(x, unused):
        return forward(x[:, ::-1], unused)

    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    given = [torch.from_numpy(x), torch.zeros(3)]
    with pytest.raises(NotImplementedError, match="torch runs kernels and .*, got rev"):
        TorchFunction(backward, *given, device=torch.device("cpu"))
    program = TorchFunction(forward, *given, device=torch.device("cpu"))
    for found, want in zip(program.launch(given), forward(jnp.asarray(x), None), strict=True):
        torch.testing.assert_close(found, to_torch(want), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"expected float32\[2, 3\] on cpu, got float32\[3\] on cpu"):
        program.launch(given[::-1])


def test_launches_get_the_addresses_of_tensors(cache, monkeypatch):
    """The arguments that a kernel is launched with: grid, stream, then operands and results where the plan has them."""
    launched = record_launches(monkeypatch)
    k, v, _ = tokens(1, 0)
    KernelAppend(cache.arrays)(k, v)
    assert [call[0] for call in launched] == ["leave", "encode", "enter"]
    assert all(call[1:8] == (*call[1:4], 7, "function", "metadata", None) for call in launched)
    enter = launched[-1]
    window = [getattr(cache.arrays, name).data_ptr() for name in ("exact_keys", "exact_values", "length", "compressed")]
    assert list(enter[10:12]) == [k.data_ptr(), v.data_ptr()]
    assert list(enter[13:17]) == window and list(enter[18:22]) == window
    assert launched[0][-3] == launched[1][10], "what leaves is what is encoded"


def test_bound_programs_check_what_they_are_bound_to():
    aligned = torch.zeros(64)
    with pytest.raises(ValueError, match="expected contiguous memory aligned to 16 bytes, got strides .* at offset 4"):
        BoundProgram(lambda x: x, aligned[1:], kind=Interpreted)()
    assert BoundProgram(lambda x, y: (x, y + 1), aligned, kind=Interpreted)(torch.ones(9)[1:])[1].tolist() == [2.0] * 8


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
