"""Caches are where they are made, whatever `torch.set_default_device` and `with torch.device(...)` say.

The device "meta" stands for any device that the tensors of the host are not on.
"""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_hf import tiny  # noqa: E402

from interop.hf import TurboQuantCache  # noqa: E402
from interop.hf.handle import LogitArguments  # noqa: E402

OPTIONS = dict(window=16, page_size=16, dtype="float32")


def padded_layer():
    """A padded prompt, rows moved and cropped, and more tokens: what padding, beams and assistants do to a layer."""
    random = torch.Generator("cpu").manual_seed(0)
    q, k = (torch.randn(2, heads, 90, 32, generator=random, device="cpu") for heads in (4, 2))
    real = torch.ones(2, 90, dtype=torch.bool, device="cpu")
    real[1, :7] = False
    layer, logits = (
        TurboQuantCache(tiny(num_hidden_layers=1).config, **OPTIONS).layers[0],
        LogitArguments(None, None, None),
    )
    layer.store(q[:, :, :60], k[:, :, :60], k[:, :, :60], real[:, :60])
    layer.attend(q[:, :, 60:80], k[:, :, 60:80], k[:, :, 60:80], real[:, :80], logits)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([1, 2], device="cpu"))
    layer.reorder_cache(torch.tensor([0, 1], device="cpu"))
    layer.crop(-3 if transformers.__version__[0] != "4" else 77)
    last = slice(77, 90)
    out = layer.attend(q[:, :, last], k[:, :, last], k[:, :, last], real, logits)
    return layer, out


def test_layers_stay_where_they_are():
    expected = padded_layer()
    with torch.device("meta"):
        inside = padded_layer()
    torch.set_default_device("meta")
    try:
        after = padded_layer()
    finally:
        torch.set_default_device(None)
    for layer, out in (inside, after):
        assert layer.cache.lengths == expected[0].cache.lengths and torch.equal(layer.real, expected[0].real)
        assert layer.cache._version.device.type == "cpu"  # by it, compiled graphs know the cache
        torch.testing.assert_close(out, expected[1], rtol=0, atol=0)
        layer.reset()
        assert layer.cache.lengths == (0, 0)
