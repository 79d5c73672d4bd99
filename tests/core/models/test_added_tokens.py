"""Special tokens and settings beside `tokenizer.json`: the ids and names of transformers, or a refusal."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tq_jax.models import load_tokenizer

TEXT = "hello<x> <y>z <bos>world <x>"


@pytest.fixture(scope="module")
def backend():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=264, special_tokens=["<pad>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello world"], trainer)
    return backend


def write(backend, folder, config=None, **files):
    backend.save(str(folder / "tokenizer.json"))
    files |= {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})}
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


X, Y = 264, 265
TABLE = {"content": "<x>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({}, {"added_tokens": {"<x>": X, "<y>": Y}}),
        ({}, {"added_tokens": {"<y>": X, "<x>": Y}, "special_tokens_map": {"eos_token": "<x>"}}),
        ({"added_tokens_decoder": {str(X): TABLE}}, {}),
        ({"added_tokens_decoder": {"1": TABLE | {"content": "<bos>"}}}, {}),
        # The older files do not count beside added_tokens_decoder.
        (
            {"added_tokens_decoder": {str(X): {"content": "<x>"}}},
            {"added_tokens": {"<y>": Y}, "special_tokens_map": {"bos_token": "<bos>"}},
        ),
        ({"bos_token": "<pad>"}, {"special_tokens_map": {"bos_token": "<bos>", "eos_token": TABLE}}),
        ({}, {"special_tokens_map": {"additional_special_tokens": ["<x>", "<y>"]}}),
        ({"extra_special_tokens": ["<y>"]}, {"special_tokens_map": {"extra_special_tokens": ["<x>", "<y>"]}}),
        ({"additional_special_tokens": ["<x>"]}, {"special_tokens_map": {"additional_special_tokens": ["<y>"]}}),
        ({"extra_special_tokens": {"image_token": "<x>"}, "boi_token": "<y>"}, {}),
        ({"eos_token": "<x>", "pad_token": "<pad>", "unk_token": None, "mask_token": "<y>"}, {}),
        ({"split_special_tokens": True, "bos_token": "<bos>"}, {}),
        ({"add_prefix_space": False}, {}),
    ],
)  # fmt: skip
def test_ids_and_names_of_transformers(backend, tmp_path, config, files):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(write(backend, tmp_path, config, **files))
    ours = load_tokenizer(tmp_path)
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"]
    assert ours.special == theirs.special_tokens_map
    ours.save(tmp_path)
    for path in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / path).unlink(missing_ok=True)
    again = load_tokenizer(tmp_path)
    assert (again.encode(TEXT), again.special) == (ours.encode(TEXT), ours.special)


@pytest.mark.parametrize(
    ("config", "files", "error", "message"),
    [
        ({}, {"added_tokens": {"<x>": X + 1}}, ValueError, "expected '<x>' to be the token 265, got 264"),
        ({"added_tokens_decoder": {"7": TABLE}}, {}, ValueError, r"_config.json: expected '<x>' to be the token 7"),
        ({"added_tokens_decoder": {"x": TABLE}}, {}, ValueError, "expected ids in added_tokens_decoder, got 'x'"),
        ({}, {"added_tokens": {"<x>": "264"}}, ValueError, "expected '<x>' to be a whole number below .*, got '264'"),
        ({"extra_special_tokens": 3}, {}, ValueError, "expected extra_special_tokens to be a list .* got 3"),
        ({}, {"special_tokens_map": {"bos_token": [3]}}, ValueError, "map.json: expected bos_token to be"),
        ({"add_prefix_space": True}, {}, NotImplementedError, "True: supported is that of tokenizer.json, False"),
    ],
)  # fmt: skip
def test_what_is_refused(backend, tmp_path, config, files, error, message):
    with pytest.raises(error, match=message):
        load_tokenizer(write(backend, tmp_path, config, **files))
