"""Options and plans, which need no vLLM."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from interop.vllm.calls import SIZES, plan_calls  # noqa: E402
from interop.vllm.options import Options  # noqa: E402


def test_options_by_name():
    options = Options.from_config({"tq_jax": {"key_bits": 3, "value_kind": "group", "value_bits": 2, "search": False}})
    key, value = options.quantizers(64)
    assert (key.bits, key.scale, key.search) == (3, "unbiased", False)
    assert (value.kind, value.bits, value.search) == ("group", 2, False)
    assert options.label == "K3/V2 (group)"
    assert Options.from_config({}) == Options.from_config({"other": 1}) == Options()
    prod = Options(key_kind="prod", key_bits=3).quantizers(64)[0]
    assert (prod.kind, prod.scale, prod.search) == ("prod", None, False)


def test_bytes_are_those_of_codes_and_scales():
    assert Options().content_bytes(64, itemsize=2) == 32 + 32 + 2 + 2
    # Padded to whole elements of the model's type.
    assert Options(key_bits=3, value_bits=3).content_bytes(80, itemsize=4) == 64 == 2 * (30 + 2)
    assert Options(key_bits=3, value_bits=4).content_bytes(80, itemsize=4) == 76 > 30 + 40 + 4


def test_boundary_layers():
    options = Options(boundary_layers=2)
    assert [options.compressed(i, 6) for i in range(6)] == [False, False, True, True, False, False]
    assert all(Options().compressed(i, 2) for i in range(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 4}, "expected tq_jax options among .* got \\['bits'\\]"),
        ({"key_kind": "group"}, "expected key_kind in .*mse.*prod.*, got 'group'"),
        ({"value_kind": "prod"}, "expected value_kind in .*mse.*group.*, got 'prod'"),
        ({"key_bits": "4"}, "expected key_bits to be a number of bits, got '4'"),
        ({"search": 1}, "expected search to be true or false, got 1"),
        ({"boundary_layers": -1}, "expected boundary_layers to be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "expected seed to be an integer of at least 0, got 1.5"),
        ({"statistics": 3}, "expected statistics to be a path, got 3"),
        ("k4v4", "expected 'tq_jax' in the additional config to be a table of options, got 'k4v4'"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Options.from_config({"tq_jax": given})


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_calls_cover_every_query_once(sizes):
    """Decodes, short and long chunks mixed: each query is asked once, at its position, with its request's blocks."""
    counts, lengths = [1, 300, 1, 8, 70, 1, 3], [50, 300, 1, 9, 600, 7, 3]
    starts = [0, *itertools.accumulate(counts)]
    table = torch.arange(7 * 20, dtype=torch.int32).view(7, 20)
    positions = torch.cat([torch.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)])
    request = torch.repeat_interleave(torch.arange(7), torch.tensor(counts))
    asked, output = torch.zeros(starts[-1], dtype=torch.int64), torch.full((starts[-1], 2), -1)
    for call in plan_calls(starts, torch.tensor(lengths, dtype=torch.int32), table, sizes):
        query = call.take(torch.stack([positions, request], 1))
        batch, size = query.shape[:2]
        assert size in sizes and batch & (batch - 1) == 0
        rows = call.rows
        step = torch.arange(size)
        real = step < rows.counts[:, None]
        assert torch.equal((rows.lengths - rows.counts)[:, None] + step, query[..., 0].where(real, step + 0)) or bool(
            ((rows.lengths - rows.counts)[:, None] + step == query[..., 0])[real].all()
        )
        assert torch.equal(rows.table[:, None].expand(-1, size, -1)[real], table[query[..., 1][real]])
        assert not rows.counts[rows.lengths == 0].any()
        tokens = call.tokens if call.real is None else call.tokens[call.real]
        asked[tokens] += 1
        call.put(query, output)
    assert bool((asked == 1).all())
    assert torch.equal(output, torch.stack([positions, request], 1))
