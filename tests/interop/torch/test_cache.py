import copy
import dataclasses
import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fake_quant import FakeQuantRow  # noqa: E402

import tq_jax as tq  # noqa: E402
from interop.torch.cache import TorchCache  # noqa: E402
from interop.torch.dlpack import to_torch  # noqa: E402

H, G, D = 2, 2, 32
PACKED = tq.CacheSpec(
    H, D, 160, tq.QuantizerSpec(D, 3, kind="prod"), tq.QuantizerSpec(D, 2, kind="group"), window=16, page_size=16
)  # fmt: skip
PLAIN = dataclasses.replace(
    PACKED, key=tq.QuantizerSpec(D, 2.5), value=tq.QuantizerSpec(D, 3.5),
    window=0, sink_tokens=0, center_keys=False, smooth_keys=False, dtype="float32",
)  # fmt: skip
SPECS = {"packed": PACKED, "plain": PLAIN}


def chunk(count: int, seed: int = 0, rows: int = 2):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, rows, count, H, D)).astype(np.float32)
    return (
        torch.from_numpy(2 * k + 3),
        torch.from_numpy(v),
        torch.from_numpy(rng.standard_normal((rows, count, H * G, D)).astype(np.float32)),
    )


def as_jax(*tensors):
    return [jnp.asarray(tensor.numpy()) for tensor in tensors]


def assert_same_bytes(ours: TorchCache, theirs: tq.Cache) -> None:
    """Everything that counts: whatever lies behind the counters may differ."""
    for name, a in jax.tree_util.tree_leaves_with_path(ours.arrays):
        b = dict(jax.tree_util.tree_leaves_with_path(to_torch(theirs)))[name]
        if "statistics" in str(name):  # sums, which XLA may order otherwise in a smaller computation
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
        else:
            assert torch.equal(a.view(torch.uint8) if a.dtype == torch.bfloat16 else a,
                               b.view(torch.uint8) if b.dtype == torch.bfloat16 else b), name  # fmt: skip


@pytest.fixture(params=SPECS)
def spec(request) -> tq.CacheSpec:
    return SPECS[request.param]


def test_the_bytes_and_attention_of_jax(spec):
    """Prompt, ragged chunk, single tokens: the same arrays as `tq_jax.append`, and the same attention."""
    ours, theirs = TorchCache(spec, 2), tq.init_cache(spec, 2)
    places = [tensor.data_ptr() for tensor in jax.tree.leaves(ours.arrays)]
    for seed, (count, lengths) in enumerate([(40, None), (40, [40, 5]), (1, None), (1, [0, 1]), (1, None)]):
        k, v, q = chunk(40, seed)
        ours.append(k[:, :count], v[:, :count], query=q[:, :count], lengths=lengths)
        # One size for the reference: another one would be compiled anew.
        rows = jnp.asarray(lengths or [count, count], jnp.int32)
        theirs = tq.append(theirs, *as_jax(k, v), query=as_jax(q)[0], lengths=rows)
        assert_same_bytes(ours, theirs)
        assert ours.lengths == tuple(theirs.length.tolist())
        assert ours.compressed == tuple(theirs.compressed.tolist())
    q = q[:, :1]
    assert places == [tensor.data_ptr() for tensor in jax.tree.leaves(ours.arrays)]
    np.testing.assert_allclose(ours.attend(q).numpy(), tq.attend(as_jax(q)[0], theirs), atol=1e-6)


def test_options_of_attention():
    """Everything that `attend` takes reaches JAX."""
    ours, theirs = TorchCache(PLAIN, 2), tq.init_cache(PLAIN, 2)
    k, v, q = chunk(40)
    ours.append(k, v)
    theirs = tq.append(theirs, *as_jax(k, v), lengths=jnp.asarray([40, 40], jnp.int32))
    q, options = q[:, -1:], dict(sliding_window=30, softcap=4.0, scale=0.1)
    found = ours.attend(q, sink_logits=torch.ones(H * G), lengths=[1, 0], **options)
    rows = jnp.asarray([1, 0], jnp.int32)
    want = tq.attend(as_jax(q)[0], theirs, sink_logits=jnp.ones(H * G), lengths=rows, **options)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-6)


FOUR = tq.QuantizerSpec(D, 4)
CENTRED = tq.CacheSpec(H, D, 96, FOUR, FOUR, window=16, smooth_keys=False, page_size=16, dtype="float32")


def filled(spec: tq.CacheSpec = CENTRED, count: int = 50, rows: int = 2) -> TorchCache:
    cache = TorchCache(spec, rows)
    k, v, q = chunk(count, rows=rows)
    cache.append(k, v, query=q)
    return cache


def assert_attends_alike(a: TorchCache, b: TorchCache) -> None:
    q = chunk(1, 9, rows=a.rows)[2]
    assert torch.equal(a.attend(q), b.attend(q))


@pytest.mark.parametrize("length", [45, 33, 20, 3, 0])
def test_cropping_against_the_oracle(length):
    """Into the window, to its start, below what is compressed, into the sinks, to nothing; then on from there."""
    cache, rows = filled(), [FakeQuantRow(CENTRED) for _ in range(2)]
    for i, row in enumerate(rows):
        row.append(*(x[i].numpy() for x in chunk(50)[:2]))
    cache.crop([length, 50])
    rows[0].crop(length)
    assert cache.lengths == (length, 50) and cache.compressed == tuple(row.compressed for row in rows)
    for seed, count in ((2, 1), (3, 30), (4, 1)):
        k, v, q = chunk(count, seed)
        cache.append(k, v)
        for i, row in enumerate(rows):
            row.append(k[i].numpy(), v[i].numpy())
        want = np.stack([row.attend(q[i].numpy()) for i, row in enumerate(rows)])
        np.testing.assert_allclose(cache.attend(q).numpy(), want, atol=1e-5)
        assert cache.compressed == tuple(row.compressed for row in rows)


def test_a_fork_is_independent():
    cache = filled()
    fork, before = cache.fork(), cache.fork()
    assert fork.arrays.key_quantizer.rotations[0] is cache.arrays.key_quantizer.rotations[0]
    fork.append(*chunk(30, 5)[:2])
    assert_attends_alike(cache, before)
    cache.append(*chunk(30, 5)[:2])
    assert_attends_alike(cache, fork)


def test_copies_and_pickles_are_forks():
    """None shares bytes with the original, or the number by which compiled graphs find it."""
    cache = filled()
    for other in (copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        before = cache.fork()
        assert_attends_alike(other, cache)
        other.append(*chunk(30, 5)[:2])
        assert_attends_alike(cache, before)
        before.append(*chunk(30, 5)[:2])
        assert_attends_alike(other, before)
        assert other._number != cache._number


def test_a_gradient_is_refused():
    cache, query = filled(), chunk(1)[2].requires_grad_()
    with torch.no_grad():
        assert not cache.attend(query).requires_grad
    with pytest.raises(NotImplementedError, match="for inference, got a gradient to pass back through it"):
        (cache.attend(query) + query).sum().backward()


def test_reordering_rows():
    cache = TorchCache(CENTRED, 3)
    cache.append(*chunk(50, rows=3)[:2], lengths=[50, 20, 35])
    whole, places = cache.fork(), [x.data_ptr() for x in jax.tree.leaves(cache.arrays)]
    q = chunk(1, 9, rows=3)[2]
    want = torch.stack([whole.attend(q[i].expand_as(q))[old] for i, old in enumerate([2, 1, 2])])
    cache.reorder([2, 1, 2])
    assert cache.lengths == (35, 20, 35) and places == [x.data_ptr() for x in jax.tree.leaves(cache.arrays)]
    torch.testing.assert_close(cache.attend(q), want, rtol=0, atol=1e-6)
    whole.reorder(torch.tensor([1, 0]))
    assert whole.rows == 2 and whole.lengths == (20, 50)
    with pytest.raises(ValueError, match=r"expected rows from 0 to 1, got \[0, 2\]"):
        whole.reorder([0, 2])


def test_growing():
    cache, large = filled(), filled(dataclasses.replace(CENTRED, max_tokens=200))
    cache.reserve(200)
    cache.reserve(10)
    assert cache.spec == large.spec and cache.nbytes == large.nbytes
    for count in (60, 60):
        k, v, _ = chunk(count, count)
        cache.append(k, v)
        large.append(k, v)
    assert_attends_alike(cache, large)
    small = TorchCache(dataclasses.replace(CENTRED, max_tokens=10), 1)
    with pytest.raises(ValueError, match="expected a cache of at least 20 tokens to grow, got max_tokens=10"):
        small.reserve(20)
    sizes = {"num_kv_heads": H, "head_dim": D, "dtype": "bfloat16"}
    full, small = (TorchCache(tq.CacheSpec.full_precision(**sizes, max_tokens=size), 2) for size in (140, 50))
    for count in (50, 90):
        k, v, _ = chunk(count, count)
        small.reserve(small.lengths[0] + count)
        small.append(k, v)
        full.append(k, v)
    assert small.spec == full.spec and small.nbytes == full.nbytes
    assert_attends_alike(small, full)
    unpaged = TorchCache(dataclasses.replace(CENTRED, max_tokens=20), 1)
    assert unpaged.arrays.pages is None
    unpaged.reserve(96)
    assert unpaged.nbytes == TorchCache(CENTRED, 1).nbytes


def test_resetting_gives_a_new_cache():
    cache = filled(count=90)
    cache.reset()
    cache.append(*chunk(50)[:2])
    assert_attends_alike(cache, filled())


def test_saving_and_loading(tmp_path):
    cache, other = filled(), filled(count=70)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    state = torch.load(tmp_path / "cache.pt", weights_only=True)
    other.load_state_dict(state)
    assert other.lengths == cache.lengths
    assert_attends_alike(cache, other)
    other.append(*chunk(40, 6)[:2])
    cache.append(*chunk(40, 6)[:2])
    assert_attends_alike(cache, other)


def test_a_wrong_state_changes_nothing():
    cache = filled()
    before, state = cache.fork(), filled(count=70).state_dict()
    wide, scale = state["length"] + 27, state["pages.keys.scale"].float()
    cases = [
        (r"got missing=\['length'\] unknown=\['size'\]", {"size": state["length"]}, ["length"]),
        (r"expected length of torch.int32\[2\], got torch.int32\[1\]", {"length": state["length"][:1]}, []),
        (r"expected overflow of torch.bool\[2\], got list", {"overflow": [False]}, []),
        (r"expected pages.keys.scale of torch.float16.*, got torch.float32", {"pages.keys.scale": scale}, []),
        ("expected a state of spec {.*\"window\": 16}, got {}", {"spec": "{}"}, []),
        (r"all compressed but the first 4 and at most 16 of the latest; got length=\[97, 97\]", {"length": wide}, []),
        (r"got length=\[70, 70\], compressed=\[49, 49\]", {"compressed": state["compressed"] - 1}, []),
    ]  # fmt: skip
    for message, changes, dropped in cases:
        wrong = {name: value for name, value in (state | changes).items() if name not in dropped}
        with pytest.raises(ValueError, match=message):
            cache.load_state_dict(wrong)
        assert cache.lengths == (50, 50)
        for a, b in zip(jax.tree.leaves(cache.arrays), jax.tree.leaves(before.arrays), strict=True):
            assert torch.equal(a, b)


def test_from_jax_copies():
    theirs = tq.init_cache(CENTRED, 2, seed=3)
    cache = TorchCache.from_jax(theirs)
    other = TorchCache(CENTRED, 2, seed=3)
    for one in (cache, other):
        one.append(*chunk(50)[:2])
    assert theirs.length.tolist() == [0, 0] and cache.nbytes == theirs.nbytes
    assert_attends_alike(cache, other)


def test_nothing_to_append():
    """No tokens and no rows."""
    cache = TorchCache(PACKED, 2)
    k, v, q = chunk(40)
    cache.append(k, v, query=q)
    before = cache.fork()
    cache.append(k[:, :0], v[:, :0], query=q[:, :0])
    cache.append(k, v, query=q, lengths=[0, 0])
    assert_attends_alike(cache, before)
    cache.crop(torch.tensor([30, 35]))
    assert cache.lengths == (30, 35) and all(type(n) is int for n in cache.lengths)
    for count, length in (
        (np.int64(1), np.int32(29)),
        (torch.tensor(1), torch.tensor(29)),
        (np.ones(2, int), [29, 29]),
    ):
        cache.advance(count)
        assert cache.lengths == (31, 36)
        cache.crop(length)
        assert cache.lengths == (29, 29)
        cache.crop([29, 29])
        cache.append(k[:, :6], v[:, :6], lengths=[1, 6])
    cache.reorder([])
    cache.append(k[:0], v[:0], query=q[:0])
    assert cache.lengths == () and cache.attend(q[:0, :1]).shape == (0, 1, H * G, D)


def test_a_full_precision_cache():
    cache = TorchCache(tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=60, dtype="float32"), 2)
    k, v, q = chunk(50)
    cache.append(k, v)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(cache.attend(q), want.transpose(1, 2), rtol=0, atol=1e-5)


def test_a_capture_leaves_the_counters_of_the_host(monkeypatch):
    """Launches that a CUDA graph records do not run, so replays are announced; lengths may lie on the GPU."""
    cache, recorded = filled(), []
    monkeypatch.setattr(TorchCache, "is_capturing", True)
    monkeypatch.setattr(
        cache, "kernels", SimpleNamespace(append=lambda k, v, lengths: recorded.append(lengths.tolist()))
    )
    counts = torch.tensor([1, 0])
    cache.append(*chunk(1)[:2], lengths=counts)
    assert recorded == [[1, 0]] and cache.lengths == (50, 50) and cache.compressed == (30, 30)
    new = TorchCache(CENTRED, 2)
    with pytest.raises(ValueError, match=r"expected fixed key statistics when a CUDA graph captures an append, got"):
        new.append(*chunk(1)[:2])
    monkeypatch.undo()
    cache.advance()
    cache.advance([0, 3])
    assert cache.lengths == (51, 54) and cache.compressed == (31, 34)
    with pytest.raises(ValueError, match=r"at most max_tokens=96 tokens per row, got \[98, 101\]"):
        cache.advance(47)
    with pytest.raises(ValueError, match="expected a count of at least 0, or one for each of 2 rows, got -1"):
        cache.advance(-1)
    with pytest.raises(ValueError, match=r"expected 2 lengths from 0 to 1, got \[2, 0\]"):
        cache.append(*chunk(1)[:2], lengths=torch.tensor([2, 0]))


def test_sliding_windows_are_refused():
    spec = tq.CacheSpec.full_precision(num_kv_heads=1, head_dim=64, max_tokens=20, sliding_window=8)
    for make in (lambda: TorchCache(spec, 1), lambda: TorchCache.from_jax(tq.init_cache(spec, batch=1))):
        with pytest.raises(NotImplementedError, match="keeps all tokens, got sliding_window=8"):
            make()


@pytest.mark.usefixtures("unchecked_shapes")
def test_heads_before_tokens_are_noticed():
    """The layout of transformers; lengths, which then seem too large, are looked at later."""
    cache, (k, v, _) = filled(), chunk(5)
    message = r"expected k and v of shape \(2, tokens, 2, 32\) each, got \(2, 2, 5, 32\): transpose\(1, 2\)\?"
    for lengths in (None, [5, 4]):
        with pytest.raises(ValueError, match=message):
            cache.append(k.transpose(1, 2), v.transpose(1, 2), lengths=lengths)
    with pytest.raises(ValueError, match=r"got \(2, 2, 5, 31\)$"):
        cache.append(k.transpose(1, 2)[..., 1:], v.transpose(1, 2)[..., 1:])


def test_a_short_description():
    cache = filled()
    assert repr(cache) == f"TorchCache(K4/V4, rows=2, lengths=(50, 50), {cache.nbytes / 1e6:.2f} MB on cpu)"
    many = TorchCache(tq.CacheSpec.full_precision(num_kv_heads=H, head_dim=D, max_tokens=8), 9)
    assert repr(many).startswith("TorchCache(full precision, rows=9, lengths from 0 to 0, ")


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors():
    cache = filled()
    k, v, q = chunk(2)
    cases = [
        (r"expected k and v of shape \(2, tokens, 2, 32\) each, got \(1, .*\) and", lambda: cache.append(k[:1], v)),
        (r"expected k and v of shape .*, got .* and \(2, 1, 2, 32\)", lambda: cache.append(k, v[:, :1])),
        (r"expected query of shape .*, got \(2, 1, 4, 32\)", lambda: cache.append(k, v, query=q[:, :1])),
        ("expected k to be floating point on cpu, got torch.int32 on cpu", lambda: cache.append(k.int(), v)),
        (r"expected 2 lengths from 0 to 2, got \[3, 0\]", lambda: cache.append(k, v, lengths=[3, 0])),
        (r"expected 2 lengths from 0 to 2, got \[1\]", lambda: cache.attend(q, lengths=[1])),
        (r"query of shape \(2, 2, a multiple of 2, 32\), got .*3, 32\)", lambda: cache.append(k, v, query=q[:, :, 1:])),
        (r"expected integers, one for each row, got \[1.5, 1\]", lambda: cache.append(k, v, lengths=[1.5, 1])),
        (r"one for each row, got \[True, False\]", lambda: cache.reorder(torch.tensor([True, False]))),
        ("expected k and v of shape .*, got", lambda: cache.append(k[0, 0, 0], v)),
        (r"max_tokens=96 tokens per row, got \[97, 50\]", lambda: cache.append(*chunk(47)[:2], lengths=[47, 0])),
        ("expected a length of at least 0, or one for each of 2 rows, got -1", lambda: cache.crop(-1)),
        (r"expected a length of at least 0, or one for each of 2 rows, got \[1\]", lambda: cache.crop([1])),
        ("expected a query on cpu, got one on meta", lambda: cache.attend(q.to("meta"))),
        ("expected softcap above 0, got -1.0", lambda: cache.attend(q, softcap=-1.0)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
        assert cache.lengths == (50, 50)


def test_one_file_for_jax_and_torch(spec, tmp_path):
    pytest.importorskip("safetensors")
    k, v, q = chunk(40)
    cache = TorchCache(spec, 2)
    cache.append(k, v, query=q, lengths=[40, 30])
    cache.crop([35, 30])
    cache.save(tmp_path / "torch")
    tq.save_cache(cache.as_jax(), tmp_path / "jax")
    assert (tmp_path / "torch").read_bytes() == (tmp_path / "jax").read_bytes()
    again = TorchCache.load(tmp_path / "torch", max_tokens=200)
    cache.reserve(200)
    assert (again.lengths, again.compressed) == (cache.lengths, cache.compressed)
    for both in (lambda c: None, lambda c: c.append(k, v)):
        both(again), both(cache)
        expected = cache.state_dict()
        assert expected.pop("spec") == again.state_dict()["spec"]
        for name, tensor in expected.items():
            assert torch.equal(tensor, again.state_dict()[name]), name
