import jax
import numpy as np
import pytest

from tq_jax.commands import divergence as la


@pytest.fixture(scope="module")
def reference(decoder):
    tokens = np.random.default_rng(0).integers(0, 97, 3 * la.CHUNK + 300).tolist()
    return la.make_reference(decoder, tokens, positions=2 * la.CHUNK + 5)


@pytest.mark.slow
def test_full_precision_diverges_from_nothing(decoder, reference):
    found = la.measure(decoder, reference, la.full_scheme(decoder, 600, dtype="float32"))
    assert found.positions == 2 * la.CHUNK
    assert abs(found.kl_mean) < 1e-6
    assert found.top1 == 1
    assert found.ppl == pytest.approx(found.ppl_fp, rel=1e-6)


@pytest.mark.slow
def test_more_bits_diverge_less_and_perplexity_is_the_models(decoder, reference):
    divergence = []
    for bits in (8, 4, 2):
        found = la.measure(decoder, reference, la.tq_scheme(decoder, 600, key_bits=bits, value_bits=bits))
        divergence.append(found.kl_mean)
        assert found.kl_p999 >= found.kl_mean
    assert 0 < divergence[0] < divergence[1] < divergence[2]
    hidden = jax.jit(lambda d, t: d.logits(d.forward(t)))(decoder, reference.tokens[None])
    log_probs = np.asarray(jax.nn.log_softmax(hidden[0]))
    target = np.asarray(reference.tokens)[reference.prefix + 1 :]
    nll = -log_probs[np.arange(reference.prefix, len(reference.tokens) - 1), target]
    assert found.ppl_fp == pytest.approx(np.exp(nll.mean()), rel=1e-5)


def test_schemes_say_what_they_are(decoder):
    ours = la.tq_scheme(decoder, 600, key_bits=3.5, value_bits=2)
    plain = la.published_scheme(decoder, 600, key_bits=4, value_bits=4)
    assert (ours.label, plain.label, la.full_scheme(decoder, 600).label) == (
        "K3.5/V2",
        "K4/V4 as published",
        "bfloat16",
    )
    assert plain.cache.key.scale_rule == plain.cache.value.scale_rule == "norm"
    assert not plain.cache.has_statistics
    assert plain.stored_bits == 4 + 16 / 32
    assert la.full_scheme(decoder, 600).stored_bits == 16


def test_short_texts_are_refused(decoder):
    with pytest.raises(ValueError, match=f"expected at least {la.CHUNK} positions and a text longer than .* got 50"):
        la.make_reference(decoder, list(range(50)), positions=128)
