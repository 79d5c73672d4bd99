"""The prompts of `generate_many`: their checks, their state on the host, and what is yielded of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

import tq_jax as tq
from tq_jax.models.checks import require_ids
from tq_jax.models.decoder import Decoder
from tq_jax.models.generate import padded_length

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Finished:
    """A prompt that is done.

    Attributes:
        index: Index of the prompt.
        tokens: Its new tokens; a stop token is the last of them.
        reason: "stop" after a stop token, "length" after the largest number of new tokens, "cancelled" after `cancel`:
            then `tokens` are those that had been read from the device.
    """

    index: int
    tokens: list[int]
    reason: Reason


@dataclass(eq=False)
class Request:
    """A prompt that waits or runs.

    Attributes:
        index: Index of the prompt.
        prompt: int32 [t], its tokens.
        limit: Largest number of new tokens.
        tokens: New tokens that have been read from the device.
        over: Whether it is done: nothing that is still read belongs to it.
        foreseen: New tokens after all calls that have been handed to the device, if no stop token ends it before; may
            exceed the limit.
    """

    index: int
    prompt: np.ndarray
    limit: int
    tokens: list[int] = field(default_factory=list)
    over: bool = False
    foreseen: int = 0

    @property
    def ends(self) -> bool:
        """Whether it ends by its number of tokens in the calls that have been handed to the device."""
        return self.foreseen >= self.limit

    def take(self, drawn: Sequence[int], stop: frozenset[int]) -> Finished | None:
        """Add tokens from the device.

        Args:
            drawn: Tokens; negative ones are none.
            stop: Ids that end a sequence.

        Returns:
            The result if the prompt is done.
        """
        self.tokens += [token for token in drawn if token >= 0]
        if self.tokens and self.tokens[-1] in stop:
            return self.finish("stop")
        return self.finish("length") if len(self.tokens) >= self.limit else None

    def restart(self) -> None:
        """Forget what has been drawn; the result of a prompt that was done has been lost."""
        self.tokens.clear()
        self.foreseen, self.over = 0, False

    def finish(self, reason: Reason) -> Finished:
        """End the prompt with the tokens at hand."""
        self.over = True
        return Finished(self.index, list(self.tokens), reason)


def make_requests(
    decoder: Decoder, prompts: Sequence[Sequence[int]], spec: tq.CacheSpec, max_new_tokens: int | Sequence[int]
) -> list[Request]:
    """Check all prompts.

    Args:
        decoder: The decoder.
        prompts: Token ids of each prompt.
        spec: Spec of the cache of one layer.
        max_new_tokens: Largest number of new tokens, for all prompts or per prompt.

    Returns:
        A request per prompt.

    Raises:
        ValueError: If a prompt can never run; the message names its index.
    """
    if not isinstance(max_new_tokens, (int, np.integer)) and len(max_new_tokens) != len(prompts):
        raise ValueError(f"max_new_tokens: expected a number or {len(prompts)} of them, got {len(max_new_tokens)}")
    many = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, (int, np.integer)) else max_new_tokens
    return [
        Request(index, _check_prompt(decoder, index, prompt, spec, int(limit)), int(limit))
        for index, (prompt, limit) in enumerate(zip(prompts, many, strict=True))
    ]


def _check_prompt(decoder: Decoder, index: int, prompt: Sequence[int], spec: tq.CacheSpec, limit: int) -> np.ndarray:
    """The tokens of a prompt, int32 [t]."""
    name, tokens = f"prompts[{index}]", np.asarray(prompt)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype} {tokens.shape}" if tokens.size else "none"
        raise ValueError(f"{name}: expected at least one token id, got {found}")
    require_ids(name, tokens, decoder.config)
    if limit < 1:
        raise ValueError(f"max_new_tokens of {name}: expected at least 1, got {limit}")
    needed = tokens.size + limit - 1
    for where, room in (
        ("cache_spec.max_tokens", spec.max_tokens),
        ("the model's context", decoder.config.max_context),
    ):
        if needed > room:
            parts = f"prompt {tokens.size} + {limit} new - 1"
            raise ValueError(f"{name}: expected {where} to have room for {needed} tokens ({parts}), got {room}")
    return tokens.astype(np.int32)


def bucket(length: int, longest: int) -> int:
    """The padded length of a prompt: a power of two of at least 16, or that of the longest prompt if this is less.

    Args:
        length: Tokens of the prompt.
        longest: Tokens of the longest prompt.

    Example:
        >>> bucket(5, 300), bucket(70, 300), bucket(280, 300)
        (16, 128, 320)
    """
    return min(max(16, 1 << (length - 1).bit_length()), padded_length(longest))
