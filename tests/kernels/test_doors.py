"""Former module paths, which warn and give the objects of the new ones, and the ones that stay."""

import importlib
import sys

import jax
import numpy as np
import pytest

from pallas_kernels import attention, encode, pages
from tests.kernels.cases.pages import Variant, make_case

DOORS = {
    "pallas_kernels.decode": ["LogitOptions", "Pages", "Partial", "TileConfig", "merge"],
    "pallas_kernels.prefill": ["PrefillConfig"],
}


@pytest.mark.parametrize("old", DOORS)
def test_a_former_path_warns_and_gives_the_same_objects(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved to pallas_kernels.attention$"):
        door = importlib.import_module(old)
    for name in DOORS[old]:
        assert getattr(door, name) is getattr(pages if name == "Pages" else attention, name)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_a_former_operation_takes_fields_and_does_the_same(op):
    """The former arguments are the fields of `PagedArguments`, in the former order and by the former names."""
    case = make_case(Variant(dim=64, lengths=(40, 3), group=2))
    door = getattr(importlib.import_module(f"pallas_kernels.{op}"), f"{op}_attention")
    want = getattr(attention, f"{op}_attention")(case.arguments, implementation="reference")
    query, pools, table, lengths = case.arrays
    got = door(
        query, pages=pools, block_table=table, lengths=lengths, **case.options, implementation="reference", config=None
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, door(*case.arrays, **case.options), want)


def test_encode_stays():
    assert set(encode.__all__) >= {"TileConfig", "encode", "encode_pages"}
    assert all(hasattr(encode, name) for name in encode.__all__)
