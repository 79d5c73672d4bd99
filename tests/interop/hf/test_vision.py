"""Vision-language models by the documented call: `set_attn_implementation`, then `generate` with an image or video."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fake_quant_hf import given  # noqa: E402
from family_checks import (  # noqa: E402
    GREEDY,
    MOST_KL,
    WINDOW,
    check,
    compress,
    is_known,
    make_vision,
    run,
)
from family_checks import ask_vision as ask  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache  # noqa: E402
from vision_families import FAMILIES  # noqa: E402
from vision_inputs import prompt  # noqa: E402

from interop.hf import ATTENTION, TurboQuantCache  # noqa: E402
from interop.hf.layer import VERSION  # noqa: E402

ALWAYS = (
    "gemma3", "internvl", "llava_onevision", "mllama", "molmo2", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
    "qwen3_vl", "smolvlm", "video_llama_3",
)  # fmt: skip
"""A third of the families: those that people run most, and one of each kind of attention."""

pytestmark = pytest.mark.filterwarnings("ignore:TurboQuantCache compresses .* layers:UserWarning")


def cases():
    for name, family in FAMILIES.items():
        for kind in ("image", "video"):
            if getattr(family, kind) is not None:
                marks = () if name in ALWAYS else pytest.mark.families
                yield pytest.param(name, kind, marks=marks, id=f"{name}-{kind}")


def make(name):
    """A model of a family, or a skip in a transformers that does not have it."""
    if not is_known(FAMILIES[name].config["model_type"]):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return make_vision(name)


@pytest.mark.parametrize(("name", "kind"), list(cases()))
def test_exact_tokens_inside_the_window(name, kind):
    """The tokens and logits of DynamicCache, close ones at 8 bits; another image gives others, so that it is seen."""
    model = make(name)
    found = check(model, ask(name, kind))
    assert found.is_exact and found.compressed and 0 < found.kl < MOST_KL, found
    first, other = (run(model, ATTENTION, compress(model), **ask(name, kind, seed))[1][0] for seed in (0, 1))
    assert (first - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_padded_batches_with_bidirectional_images(name):
    """Two prompts of different lengths, each with its image."""
    model, rows = make(name), [ask(name, "image", seed) for seed in (0, 1)]
    asked = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    for key in set(asked) - {"pixel_values"}:
        asked[key] = torch.nn.functional.pad(asked[key], (3, 0))
        asked[key][1, :-3] = asked[key][1, 3:].clone()
        asked[key][1, -3:] = {"input_ids": 20, "attention_mask": 1}.get(key, 0)
    tokens, logits = run(model, "sdpa", DynamicCache(config=model.config), **asked)
    cache = TurboQuantCache(model.config, window=WINDOW, dtype="float32")
    found, ours = run(model, ATTENTION, cache, **asked)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)
    lengths = next(layer.cache.lengths for layer in cache.layers if hasattr(layer, "cache"))
    assert lengths == (cache.get_seq_length() - 3, cache.get_seq_length())


def test_prompts_that_read_their_codes_are_causal():
    """Image tokens that see later ones need the prompt as it is."""
    model, asked = make("molmo2"), ask("molmo2", "image")
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="that see later ones.* of an exact_prompt cache"):
        model(**asked, **given(TurboQuantCache(model.config, exact_prompt=False)))


@pytest.mark.parametrize("name", ["smolvlm", "molmo2", "gemma3", "qwen3_vl"])
def test_later_turns(name):
    """A chat that goes on about its image, and then shows another one, on the same cache."""
    if name == "gemma3" and VERSION < (5, 0):
        pytest.skip("transformers 4 takes no second image, with its own cache either")
    model, turns = make(name), []
    caches = DynamicCache(config=model.config), TurboQuantCache(model.config, window=WINDOW, dtype="float32")
    for attention, cache in zip(("sdpa", ATTENTION), caches, strict=True):
        first, _ = run(model, attention, cache, **ask(name, "image"))
        history = torch.cat([first, torch.tensor([[12, 13, 14]])], 1)
        second, logits = run(model, attention, cache, input_ids=history, attention_mask=torch.ones_like(history))
        again = ask(name, "image", seed=1)
        again["input_ids"] = torch.cat([second[:, cache.get_seq_length() :], again["input_ids"]], 1)
        types = FAMILIES[name].types_name
        if types in again:
            again[types] = torch.nn.functional.pad(
                again[types], (again["input_ids"].shape[1] - again[types].shape[1], 0)
            )
        del again["attention_mask"]
        with torch.no_grad():
            turns.append((second, logits, model(**again, **given(cache)).logits))
    for ours, exact in zip(turns[1], turns[0], strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_memory_of_a_long_video():
    """11,000 tokens of video in heads of 128 channels, those of Molmo2 and Qwen-VL, read from real caches."""
    from dataclasses import replace

    from vision_inputs import molmo2

    if not is_known("molmo2"):
        pytest.skip(f"transformers {transformers.__version__} has no molmo2")
    family = FAMILIES["molmo2"]
    text = family.config["text_config"] | dict(num_hidden_layers=1, num_attention_heads=1, head_dim=128)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(family.config | dict(text_config=text | dict(max_position_embeddings=1 << 14))))
    model = AutoModelForImageTextToText.from_config(config).eval()
    asked = prompt(replace(family, config={}), molmo2("video", 2750)(), "video")
    assert asked["input_ids"].shape[1] == 11_007
    model.set_attn_implementation(ATTENTION)
    cache = TurboQuantCache(model.config)
    model.generate(**asked, **given(cache), **(GREEDY | dict(max_new_tokens=3)))
    assert cache.get_seq_length() == 11_009
    assert 0.25 < cache.nbytes / (2 * 2 * 128 * 11_009) < 0.28
