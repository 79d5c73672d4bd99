import contextlib
import json
import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import GIVEN
from tokenizers import pre_tokenizers

from tq_jax.data import persuasion
from tq_jax.models import load_tokenizer
from tq_jax.models.gguf_file import read_gguf
from tq_jax.models.tokenizer import Tokenizer
from tq_jax.models.tokenizer_gguf import tokenizer_from_gguf

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 2024 there were 12,345 cats; pi is 3.14159, version v2.0.1rc3.",
    "    def f(x):\n\t\treturn x ** 2  # squared\n\n\n",
    "I'll say it's we've they'd DON'T 'tis",
    "naïve café Ünïcödé Привет 你好世界 日本語 العربية 🤖👩‍👩‍👧 e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<|im_end|",
    "http://example.com/a?b=c&d=%20 foo@bar.org C:\\path\\to",
    " leading and trailing  ",
    "\u200b\u00a0\u3000 \r\n mixed\x00control",
    "",
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]


@pytest.fixture(scope="module")
def theirs(gguf_path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    pieces = [*" \n\t.,'-_0123456789", "the", "ing", "Über", "ß", "中", "🙂", "  ", "'s", "Ab"]
    return ["".join(rng.choices(pieces, k=40)) for _ in range(count)]


@pytest.mark.weights
def test_same_ids_as_transformers(smollm, theirs):
    # transformers does not split digits, although this pre-tokenizer ("smollm") does; see the next test.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    )
    for text in [*TEXTS, *random_texts(300)]:
        assert smollm.tokenizer.encode(text) == theirs(text).input_ids, repr(text)


@pytest.mark.weights
def test_digits_are_split_before_spaces_are_joined(smollm):
    # llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM and the original tokenizer split digits first, then by the GPT-2 pattern.
    encode, names = smollm.tokenizer.encode, smollm.tokenizer.backend.id_to_token
    assert [names(i) for i in encode("a  12")] == ["a", "ĠĠ", "1", "2"]
    assert [names(i) for i in encode("a  b")] == ["a", "Ġ", "Ġb"]


@pytest.mark.weights
def test_text_survives(smollm):
    for text in TEXTS:
        assert smollm.tokenizer.decode(smollm.tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.weights
@pytest.mark.parametrize("messages", CHATS, ids=["default_system", "system", "turns"])
@pytest.mark.parametrize("prompt", [True, False])
def test_same_chat_as_transformers(smollm, theirs, messages, prompt):
    ours = smollm.tokenizer.chat_prompt(messages, add_generation_prompt=prompt)
    assert ours == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.weights
def test_chat_prompt_text(smollm):
    assert smollm.tokenizer.chat_prompt(CHATS[1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm.tokenizer.encode_chat(CHATS[1])[:2] == [1, smollm.tokenizer.encode("system")[0]]


@pytest.mark.weights
def test_save_and_load(gguf_path, smollm, tmp_path):
    built = tokenizer_from_gguf(read_gguf(gguf_path).metadata)
    built.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXTS[4]) == built.encode(TEXTS[4]) == smollm.tokenizer.encode(TEXTS[4])
    assert (again.chat_template, again.special) == (built.chat_template, built.special)


METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "<u>"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
}


def test_first_token_and_user_tokens():
    tokenizer = tokenizer_from_gguf(METADATA | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("aba") == [0, 3, 1]
    assert tokenizer.encode("aba", add_special_tokens=False) == [3, 1]
    assert tokenizer.encode("a<u>b")[1:] == [1, 4, 2]
    assert tokenizer.decode([0, 3, 4]) == "ab<u>"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, NotImplementedError, r"model='bert': supported are \['gpt2', 'llama'\]"),
        ({"tokenizer.ggml.pre": "tekken"}, NotImplementedError, "pre='tekken': supported are"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b", "ab", "c"]}, ValueError, "got 4 distinct of 5"),
        ({"tokenizer.ggml.merges": ["a z"]}, ValueError, "expected pairs of known tokens"),
        ({"tokenizer.ggml.bos_token_id": 5}, ValueError, "bos_token_id: expected an id below 5, got 5"),
        ({"tokenizer.ggml.merges": None}, ValueError, "merges: expected a list, got NoneType"),
        ({"tokenizer.ggml.add_eos_token": True}, ValueError, "eos_token_id: expected an id"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(METADATA | change)


def train(kind: str, **options):
    """A small vocabulary with merges, learned from some text by the tokenizers library."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, trainers

    backend = Backend(models.BPE(**options))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        alphabet = ["▁", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(persuasion()[:60_000].split("\n"), trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def learned():
    return train("bytes")


def bytes_metadata(learned, pre: str, added: list[str]) -> dict:
    vocabulary, merges = learned
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*vocabulary, *added],
        "tokenizer.ggml.token_type": [1] * len(vocabulary) + [3] * len(added),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def test_qwen2_splits_as_its_own_tokenizer(learned):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_from_gguf(bytes_metadata(learned, "qwen2", ["<|endoftext|>"]))
    vocabulary, merges = learned
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*vocabulary, "<|endoftext|>"])}, merges=merges
    )
    for text in [*TEXTS, *random_texts(100), persuasion()[:3000]]:
        assert ours.encode(text) == theirs(text).input_ids, repr(text)


def test_llama_3_splits_into_words_and_triples_of_digits(learned):
    vocabulary, merges = learned
    known = [*vocabulary, "sensibility"]  # no merges lead to it
    ours = tokenizer_from_gguf(bytes_metadata((known, merges), "llama-bpe", ["<|eot_id|>"]))
    names = ours.backend.id_to_token
    pieces = ours.backend.pre_tokenizer.pre_tokenize_str("It's 12345 o'clock!\n\n  Sir")
    assert [piece for piece, _ in pieces] == ["It", "'s", "Ġ", "123", "45", "Ġo", "'clock", "!ĊĊ", "Ġ", "ĠSir"]
    assert [names(i) for i in ours.encode("sensibility<|eot_id|>")] == ["sensibility", "<|eot_id|>"]
    assert ours.encode("e\u0301") != ours.encode("\u00e9")


def spm_metadata(vocabulary: list[str]) -> dict:
    """Metadata as in files of Gemma: learned tokens scored by their order, runs of spaces as user-defined tokens."""
    runs = ["\n\n", *(" " * count for count in range(2, 6))]
    start = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *runs]
    learned = [token for token in vocabulary if token.replace("▁", " ") not in runs]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*start, *learned],
        "tokenizer.ggml.scores": [-1000.0] * len(start) + [-float(i) for i in range(len(learned))],
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[6] * 256, *[4] * len(runs), *[1] * len(learned)],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }


@pytest.fixture(scope="module")
def spm():
    return spm_metadata(train("letters")[0])


def test_sentencepiece_as_gemmas_tokenizer(spm):
    transformers = pytest.importorskip("transformers")
    from transformers.tokenization_utils_base import generate_merges

    ours = tokenizer_from_gguf(spm)
    tokens = [token.replace(" ", "▁") for token in spm["tokenizer.ggml.tokens"]]
    ids = {token: i for i, token in enumerate(tokens)}
    defined = {token for token, kind in zip(tokens, spm["tokenizer.ggml.token_type"], strict=True) if kind == 4}
    merges = generate_merges(ids, {token: len(token) if token in defined else -i for token, i in ids.items()})
    theirs = transformers.GemmaTokenizer(vocab=ids, merges=merges)
    for text in [*TEXTS, *random_texts(100), persuasion()[:3000]]:
        if "<|" not in text:
            assert ours.encode(text) == [2, *theirs.encode(text, add_special_tokens=False)], repr(text)
        assert ours.decode(ours.encode(text)) == text


def test_runs_of_spaces_are_as_long_as_possible(spm):
    # The tokenizer of the model's authors splits 33 spaces into 31, its longest run, and 2.
    ours = tokenizer_from_gguf(spm)
    assert [ours.backend.id_to_token(i) for i in ours.encode("a" + " " * 8 + "\n\n", add_special_tokens=False)] == [
        "a", "▁" * 5, "▁" * 3, "\n\n",
    ]  # fmt: skip


def test_what_sentencepiece_refuses(spm):
    with pytest.raises(NotImplementedError, match="add_space_prefix=True with model 'llama': supported is False"):
        tokenizer_from_gguf({k: v for k, v in spm.items() if k != "tokenizer.ggml.add_space_prefix"})
    scores = spm["tokenizer.ggml.scores"]
    with pytest.raises(NotImplementedError, match="scores in another order than the tokens"):
        tokenizer_from_gguf(spm | {"tokenizer.ggml.scores": [*scores[:-2], scores[-1], scores[-2]]})
    with pytest.raises(ValueError, match="scores: expected .*, one per token, got 3"):
        tokenizer_from_gguf(spm | {"tokenizer.ggml.scores": scores[:3]})


def test_templates():
    backend = tokenizer_from_gguf(METADATA).backend
    with pytest.raises(ValueError, match="expected a model with a chat template"):
        Tokenizer(backend=backend, chat_template=None, special={}).chat_prompt(CHATS[0])
    strict = "{{ bos_token }}{{ raise_exception('only system') }}"
    with pytest.raises(ValueError, match="only system"):
        Tokenizer(backend=backend, chat_template=strict, special={"bos_token": "<s>"}).chat_prompt(CHATS[0])
    with pytest.raises(ValueError, match="unsafe"):
        Tokenizer(backend=backend, chat_template="{{ ''.__class__.__mro__ }}", special={}).chat_prompt(CHATS[0])
    for faulty, message in (
        ("{{ 1 // 0 }}", "can write, got ZeroDivisionError"),
        ("{{ messages + 1 }}", "can write, got TypeError"),
        ("{% for m in messages %}", r"expected Jinja, got line 1: Unexpected end"),
    ):
        with pytest.raises(ValueError, match=message):
            Tokenizer(backend=backend, chat_template=faulty, special={}).chat_prompt(CHATS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y-%m') }}",
        "{{ messages | tojson(indent=2, sort_keys=true) }}",
        "{{ messages[0] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}none",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% set x = 1 %}\n  {% generation %}\n{% set x = 2 %}a{{ x }}\n  {%- endgeneration %}{{ x }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{{ m.tool_calls is defined }}{% endfor %}",
    ],
)
def test_templates_find_what_transformers_gives_them(template):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [*CHATS[2], {"role": "assistant", "content": "né"}]
    theirs = utils.render_jinja_template(conversations=[messages], chat_template=template)[0][0]
    messages[0] = messages[0] | {"tool_calls": None}
    assert Tokenizer(backend=None, chat_template=template, special={}).chat_prompt(messages) == theirs


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_metadata_holds_is_read_or_refused(data):
    name = data.draw(st.sampled_from([*METADATA, "tokenizer.chat_template", "tokenizer.ggml.add_bos_token"]))
    with contextlib.suppress(ValueError, NotImplementedError):
        tokenizer_from_gguf(METADATA | {name: data.draw(GIVEN)}).encode("ab")


def test_llama_3_starts_texts_unless_told_not_to(learned):
    added = ["<|begin_of_text|>", "<|end_of_text|>"]
    metadata = bytes_metadata(learned, "llama-bpe", added)
    bos = len(learned[0])
    metadata |= {"tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.eos_token_id": bos + 1}
    plain = tokenizer_from_gguf(metadata).encode("hi", add_special_tokens=False)
    assert tokenizer_from_gguf(metadata).encode("hi") == [bos, *plain]
    assert tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False}).encode("hi") == plain
    for pre in ("gpt-2", "qwen2", "smollm"):
        ours = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": pre})
        assert ours.encode("hi") == ours.encode("hi", add_special_tokens=False), pre


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "expected a JSON object, got list"),
        ({"bos_token": 3}, "expected bos_token to be text or a table with the text content, got 3"),
        ({"chat_template": [{"name": "x"}]}, "expected chat_template to be .* with the texts name and template"),
    ],
)
def test_settings_of_another_type_are_refused(tmp_path, contents, message):
    tokenizer_from_gguf(METADATA).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("padding", [{"length": 40}, {"pad_to_multiple_of": 32, "direction": "left"}, None])
@pytest.mark.parametrize("truncation", [{"stride": 2}, {"direction": "left"}, None])
def test_whole_texts_without_padding(tmp_path, padding, truncation):
    tokenizer = tokenizer_from_gguf(METADATA | {"tokenizer.ggml.add_bos_token": True})
    expected = tokenizer.encode("ab" * 9)
    if padding is not None:
        tokenizer.backend.enable_padding(pad_token="<u>", pad_id=4, **padding)
    if truncation is not None:
        tokenizer.backend.enable_truncation(5, **truncation)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("ab" * 9) == expected


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="expected a tokenizer, got a corrupt or truncated file"):
        load_tokenizer(tmp_path)
    tokenizer_from_gguf(METADATA).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_prompt(CHATS[0]) == "from the file"
