import dataclasses

import pytest

import tq_jax as tq
from tq_jax.commands.validate import command as distortion


@pytest.mark.sampled
@pytest.mark.parametrize("check", distortion.CHECKS, ids=lambda check: check.__name__)
def test_claims_hold(check):
    for claim in check():
        assert claim.ok, claim


def test_a_worse_quantizer_is_noticed(monkeypatch):
    """Coordinates quantized for vectors of another dimension: the fault of dividing every centroid by one sqrt(d)."""
    right = tq.codebook.codebook

    def wrong(dim, bits):
        book = right(dim, bits)
        return dataclasses.replace(book, step=1.3 * book.step)

    monkeypatch.setattr(distortion.tq.codebook, "codebook", wrong)
    assert not distortion.codebooks()[0].ok


def test_every_check_says_what_it_measures():
    assert all((check.__doc__ or "").strip() for check in distortion.CHECKS)
