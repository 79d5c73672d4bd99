"""Former module paths, which warn and give the objects of the new ones, and the ones that stay."""

import importlib
import sys

import pytest

from pallas_kernels import attention, encode, pages

DOORS = {
    "pallas_kernels.decode": ["LogitOptions", "Pages", "Partial", "TileConfig", "decode_attention", "merge"],
    "pallas_kernels.prefill": ["PrefillConfig", "prefill_attention"],
}


@pytest.mark.parametrize("old", DOORS)
def test_a_former_path_warns_and_gives_the_same_objects(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved to pallas_kernels.attention$"):
        door = importlib.import_module(old)
    for name in DOORS[old]:
        assert getattr(door, name) is getattr(pages if name == "Pages" else attention, name)


def test_encode_stays():
    assert set(encode.__all__) >= {"TileConfig", "encode", "encode_pages"}
    assert all(hasattr(encode, name) for name in encode.__all__)
