"""Tokenizers rebuilt from GGUF metadata: byte-level BPE, and SentencePiece BPE without a space prefix (Gemma)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tq_jax.models.config_gguf import TOKEN_FIELDS
from tq_jax.models.fields import COUNT, FLAG, NUMBER, TEXT, check_fields, list_of
from tq_jax.models.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"
_FIELDS = TOKEN_FIELDS | {
    "tokenizer.chat_template": TEXT,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.token_type": list_of(COUNT),
    "tokenizer.ggml.merges": list_of(TEXT),
    "tokenizer.ggml.scores": list_of(NUMBER),
    "tokenizer.ggml.bos_token_id": COUNT,
    "tokenizer.ggml.unknown_token_id": COUNT,
    "tokenizer.ggml.add_bos_token": FLAG,
    "tokenizer.ggml.add_eos_token": FLAG,
    "tokenizer.ggml.add_space_prefix": FLAG,
}
# One word, number, run of signs or run of spaces. {digits} is the quantifier of the digits that stay together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from GGUF metadata.

    Args:
        metadata: Name to value, as `gguf_file.read_gguf` returns it.

    Returns:
        The tokenizer.

    Raises:
        NotImplementedError: For an unsupported tokenizer model or pre-tokenizer.
        ValueError: If the vocabulary or the merges are missing or contradict each other, or if a field holds a value of
            another kind.
    """
    import tokenizers

    check_fields("GGUF metadata", metadata, _FIELDS)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    model = metadata.get("tokenizer.ggml.model")
    if model not in builders:
        raise NotImplementedError(f"tokenizer.ggml.model={model!r}: supported are {sorted(builders)}")
    vocabulary, kinds = (_list(metadata, name) for name in ("tokens", "token_type"))
    ids = {token: index for index, token in enumerate(vocabulary)}
    if len(ids) != len(vocabulary) or len(kinds) != len(vocabulary):
        raise ValueError(
            f"tokenizer.ggml.tokens: expected as many distinct tokens as types, got {len(ids)} distinct of "
            f"{len(vocabulary)} and {len(kinds)} types"
        )
    backend = builders[model](metadata, vocabulary, kinds)
    known = backend.get_vocab()
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        special = kind == _CONTROL
        add(
            [
                tokenizers.AddedToken(t, special=special, normalized=False)
                for t, k in zip(vocabulary, kinds, strict=True)
                if k == kind and t in known
            ]
        )
    special = {
        f"{name}_token": _token(vocabulary, key, metadata[key])
        for name in ("bos", "eos")
        if (key := f"tokenizer.ggml.{name}_token_id") in metadata
    }
    # Most files of Llama 3 do not say that a text starts with the bos token; as in SentencePiece vocabularies, it does.
    llama_3 = model == "gpt2" and metadata.get("tokenizer.ggml.pre") == "llama-bpe" and "bos_token" in special
    defaults = {"bos": model == "llama" or llama_3, "eos": False}
    backend.post_processor = _post_processor(metadata, special, ids, defaults)
    return Tokenizer(backend=backend, chat_template=metadata.get("tokenizer.chat_template"), special=special)


@dataclass(frozen=True)
class _PreTokenizer:
    """Steps before the merges of byte-level BPE.

    Attributes:
        split: Makes the pre-tokenizer, which splits a text into words.
        normal_form: Whether the text is composed first (Unicode NFC).
        whole_words: Whether a word that is in the vocabulary is one token, even if no merges lead to it.
    """

    split: Callable[[], Any]
    normal_form: bool = False
    whole_words: bool = False


def _gpt2() -> Any:
    """Words as in GPT-2."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> Any:
    """Single digits, then words as in GPT-2."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _pattern(digits: str) -> Any:
    """Words by `_SPLIT`, with a quantifier of the digits that stay together."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_SPLIT.format(digits=digits)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_gpt2),
    "llama-bpe": _PreTokenizer(lambda: _pattern("{1,3}"), whole_words=True),
    "qwen2": _PreTokenizer(lambda: _pattern(""), normal_form=True),
    "smollm": _PreTokenizer(_digits_then_gpt2),
}


def _byte_level(metadata: Mapping[str, Any], vocabulary: list[str], kinds: list[int]) -> Any:
    """BPE over bytes, with the pre-tokenizer that the metadata names."""
    from tokenizers import decoders, normalizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise NotImplementedError(f"tokenizer.ggml.pre={pre!r}: supported are {sorted(_PRE_TOKENIZERS)}")
    steps = _PRE_TOKENIZERS[pre]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _list(metadata, "merges"))]
    backend = _bpe(vocabulary, merges, ignore_merges=steps.whole_words)
    if steps.normal_form:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = steps.split()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: list[str], kinds: list[int]) -> Any:
    """BPE over characters, with bytes for unknown characters. A space counts as a letter."""
    from tokenizers import decoders, normalizers

    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise NotImplementedError("tokenizer.ggml.add_space_prefix=True with model 'llama': supported is False")
    scores = _list(metadata, "scores")
    if len(scores) != len(vocabulary):
        raise ValueError(f"tokenizer.ggml.scores: expected {len(vocabulary)}, one per token, got {len(scores)}")
    learned = [score for score, kind in zip(scores, kinds, strict=True) if kind == _NORMAL]
    if learned != sorted(learned, reverse=True):
        raise NotImplementedError("tokenizer.ggml.scores in another order than the tokens: supported is best first")
    # Files write runs of spaces as spaces, where the model's own vocabulary has the letter.
    spelled = [_SPACE * len(token) if token and not token.strip(" ") else token for token in vocabulary]
    key = "tokenizer.ggml.unknown_token_id"
    unknown = _token(vocabulary, key, metadata.get(key, 0))
    backend = _bpe(spelled, _merges(spelled, kinds), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges(vocabulary: list[str], kinds: list[int]) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every way to make a token of two tokens, the best tokens first.

    Learned tokens keep their order. User-defined tokens, such as runs of spaces, come before them, the longest first.
    With these ranks, merges grow a run of spaces from its left end to the longest run in the vocabulary.
    """
    tokens = list(zip(vocabulary, kinds, strict=True))
    defined = sorted((token for token, kind in tokens if kind == _USER_DEFINED), key=len, reverse=True)
    ranked = [*defined, *(token for token, kind in tokens if kind == _NORMAL)]
    pieces, found = set(ranked), []
    for token in ranked:
        cuts = [(token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1)]
        found += [(left, right) for left, right in cuts if left in pieces and right in pieces]
    return found


def _bpe(vocabulary: list[str], merges: list[tuple[str, str]], **options: Any) -> Any:
    """A BPE tokenizer of the vocabulary and its merges, the best merges first."""
    import tokenizers
    from tokenizers import models

    ids = {token: index for index, token in enumerate(vocabulary)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, **options))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"tokenizer.ggml.merges: expected pairs of known tokens, got {error}") from error


def _post_processor(
    metadata: Mapping[str, Any], special: Mapping[str, str], ids: Mapping[str, int], defaults: Mapping[str, bool]
) -> Any:
    """The step that adds the bos and eos tokens to a text, if the metadata or the defaults ask for them."""
    from tokenizers import processors

    template = ["$A"]
    for name, default in defaults.items():
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            if f"{name}_token" not in special:
                raise ValueError(f"tokenizer.ggml.{name}_token_id: expected an id to add to every text, got none")
            template.insert(0 if name == "bos" else len(template), special[f"{name}_token"])
    return processors.TemplateProcessing(
        single=template, special_tokens=[(token, ids[token]) for token in template if token != "$A"]
    )


def _token(vocabulary: list[str], field: str, token: int) -> str:
    """The token of an id that a metadata field holds."""
    if token >= len(vocabulary):
        raise ValueError(f"{field}: expected an id below {len(vocabulary)}, got {token}")
    return vocabulary[token]


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    """A required, non-empty list of the metadata."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value:
        raise ValueError(f"tokenizer.ggml.{name}: expected a list, got {type(value).__name__}")
    return value
