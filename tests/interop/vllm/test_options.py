"""Options and plans, which need no vLLM."""

import pytest

torch = pytest.importorskip("torch")

from interop.vllm import calls  # noqa: E402
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
        ({"window": True}, "expected window to be an integer of at least 0, got True"),
        ({"sinks": 4.0}, "expected sinks to be an integer of at least 0, got 4.0"),
        ({"seed": 1.5}, "expected seed to be an integer of at least 0, got 1.5"),
        ({"statistics": 3}, "expected statistics to be a path, got 3"),
        ("k4v4", "expected 'tq_jax' in the additional config to be a table of options, got 'k4v4'"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Options.from_config({"tq_jax": given})


def test_runs():
    """Few queries first, equally many in a row; padding belongs to the last run of a uniform step."""
    runs, first = calls.split_runs([0, 4, 8, 9, 10, 30, 31], 4)
    assert [(x.first, x.requests, x.start, x.queries) for x in runs] == [(0, 2, 0, 4), (2, 2, 8, 1)] and first == 4
    runs, first = calls.split_runs([0, 1, 1, 1], 1)
    assert [(x.first, x.requests, x.start, x.queries) for x in runs] == [(0, 3, 0, 1)] and first == 3
    assert calls.split_runs([0, 5], 4) == ([], 0)
