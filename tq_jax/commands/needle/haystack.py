"""Haystacks: a long text with facts in it, and chats each of which asks for one of the facts."""

import dataclasses

import numpy as np

from tq_jax.data import persuasion
from tq_jax.models.tokenizer import Tokenizer

DIGITS = 7
CITIES = (
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Hanoi",
    "Quebec",
    "Dakar",
    "Tbilisi",
    "Perth",
    "Bergen",
    "Malaga",
    "Osaka",
)
FACT = "Remember this: the phone number of {city} is {number}."
QUESTION = "What is the phone number of {city}?"
ANSWER = "The phone number of {city} is "
"""Beginning of the model's answer; its last token is a single space, so that the next tokens are digits."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one fact.

    Attributes:
        depth: Place of the fact in the text, from 0 (the beginning) to 1 (the end).
        prompt: Tokens of the question, and of the answer up to the number.
        answer: Tokens of the number.
    """

    depth: float
    prompt: list[int]
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A prompt with its questions.

    Attributes:
        tokens: Tokens of the chat up to the end of the text, which all questions share.
        questions: One question per fact in the text.
    """

    tokens: list[int]
    questions: list[Question]


def make_haystack(tokenizer: Tokenizer, length: int, depths: tuple[float, ...], *, seed: int) -> Haystack:
    """A chat about *Persuasion*, starting at a random chapter, with a fact at each depth.

    Args:
        tokenizer: The model's tokenizer.
        length: Largest number of tokens of the shared prompt, which has a few less.
        depths: Places of the facts, ascending.
        seed: Seed of numbers, names and chapter.

    Raises:
        ValueError: If there are more facts than names, or the length is too small or larger than the text.
    """
    if len(depths) > len(CITIES):
        raise ValueError(f"expected at most {len(CITIES)} depths, got {len(depths)}")
    rng = np.random.default_rng(seed)
    cities = rng.permutation(CITIES)[: len(depths)].tolist()
    numbers = ["".join(map(str, rng.integers(0, 10, DIGITS))) for _ in depths]
    chapters = persuasion().split("\n\nChapter ")
    start = int(rng.integers(len(chapters)))
    sentences = "\n\n".join(chapters[start:] + chapters[:start]).replace("\n", " ").split(". ")
    counts = np.cumsum(
        [len(tokenizer.encode(f" {s}.", add_special_tokens=False)) for s in sentences[: length // 4 + 1]]
    )
    facts = [FACT.format(city=c, number=n) for c, n in zip(cities, numbers, strict=True)]
    frame = _split_chat(tokenizer, "", cities[0])[0]
    room = length - len(frame) - sum(len(tokenizer.encode(f" {fact}")) for fact in facts) - 8
    if room < 1:
        raise ValueError(f"expected a length of about 200 tokens or more, got {length}")
    if counts[-1] < room:
        raise ValueError(f"expected a length of at most {int(counts[-1])} tokens, got {length}")
    text = [f"{sentence}." for sentence in sentences[: int(np.searchsorted(counts, room))]]
    places = [round(depth * len(text)) for depth in depths]
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
        text.insert(place, fact)
    questions, shared = [], []
    for depth, city, number in zip(depths, cities, numbers, strict=True):
        shared, prompt = _split_chat(tokenizer, " ".join(text), city)
        answered = tokenizer.encode(ANSWER.format(city=city) + number, add_special_tokens=False)
        given = tokenizer.encode(ANSWER.format(city=city), add_special_tokens=False)
        questions.append(Question(depth, prompt + given, answered[len(given) :]))
    return Haystack(shared, questions)


def _split_chat(tokenizer: Tokenizer, text: str, city: str) -> tuple[list[int], list[int]]:
    """Tokens of a chat: up to the end of the text, and from the question on."""
    question = QUESTION.format(city=city)
    chat = tokenizer.chat_prompt([{"role": "user", "content": f"{text}\n\n{question}"}])
    place = chat.rindex(question)
    return (
        tokenizer.encode(chat[:place], add_special_tokens=False),
        tokenizer.encode(chat[place:], add_special_tokens=False),
    )
