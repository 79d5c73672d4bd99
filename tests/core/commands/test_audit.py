import pytest

from tq_jax.commands.audit import command as audit
from tq_jax.commands.audit import memory


@pytest.mark.sampled
@pytest.mark.parametrize("check", audit.CHECKS, ids=lambda check: check.__name__)
def test_statements_hold(check):
    for claim in check():
        assert claim.ok, claim
        assert claim.judgement != "pass", "an audited claim needs a verdict of its own"


def test_ratios_fall_when_more_is_counted():
    for claim in memory.ratios():
        details = claim.details
        assert details["4k"] < details["32k"] < details["128k"] <= details["headline"] < details["indices_only"]


def test_every_check_is_listed_once():
    assert len(set(audit.CHECKS)) == len(audit.CHECKS)
