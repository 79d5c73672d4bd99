import random
import warnings

import pytest
from tokenizers import pre_tokenizers

from tq_jax.models import load_tokenizer
from tq_jax.models.gguf_file import read_gguf
from tq_jax.models.tokenizer import Tokenizer, tokenizer_from_gguf

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
    # transformers leaves out the digit splitting that this pre-tokenizer ("smollm") asks for; see the next test.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    )
    for text in [*TEXTS, *random_texts(300)]:
        assert smollm.tokenizer.encode(text) == theirs(text).input_ids, repr(text)


@pytest.mark.weights
def test_digits_are_split_before_spaces_are_joined(smollm):
    # llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM and the original tokenizer: digits first, then the GPT-2 pattern.
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
        ({"tokenizer.ggml.model": "llama"}, NotImplementedError, "model='llama': supported is 'gpt2'"),
        ({"tokenizer.ggml.pre": "tekken"}, NotImplementedError, "pre='tekken': supported are"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b", "ab", "c"]}, ValueError, "got 4 distinct of 5"),
        ({"tokenizer.ggml.merges": ["a z"]}, ValueError, "expected pairs of known tokens"),
        ({"tokenizer.ggml.merges": None}, ValueError, "merges: expected a list, got NoneType"),
        ({"tokenizer.ggml.add_eos_token": True}, ValueError, "eos_token_id: expected an id"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(METADATA | change)


def test_templates():
    backend = tokenizer_from_gguf(METADATA).backend
    with pytest.raises(ValueError, match="expected a model with a chat template"):
        Tokenizer(backend=backend, chat_template=None, special={}).chat_prompt(CHATS[0])
    strict = "{{ bos_token }}{{ raise_exception('only system') }}"
    with pytest.raises(ValueError, match="only system"):
        Tokenizer(backend=backend, chat_template=strict, special={"bos_token": "<s>"}).chat_prompt(CHATS[0])
    with pytest.raises(ValueError, match="unsafe"):
        Tokenizer(backend=backend, chat_template="{{ ''.__class__.__mro__ }}", special={}).chat_prompt(CHATS[0])


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="expected a tokenizer, got a corrupt or truncated file"):
        load_tokenizer(tmp_path)
    tokenizer_from_gguf(METADATA).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_prompt(CHATS[0]) == "from the file"
