"""A decoder with its tokenizer, loaded in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import tq_jax as tq
from tq_jax.models.config import DecoderConfig
from tq_jax.models.decoder import Decoder
from tq_jax.models.fetch import fetch_default_model
from tq_jax.models.generate import generate, pad_prompts
from tq_jax.models.sampling import Sampling
from tq_jax.models.tokenizer import Tokenizer, load_tokenizer
from tq_jax.models.weights import convert_gguf, load_decoder


@dataclass(frozen=True)
class LanguageModel:
    """A decoder and its tokenizer.

    Attributes:
        decoder: The network.
        tokenizer: The tokenizer of the same model.
    """

    decoder: Decoder
    tokenizer: Tokenizer

    @property
    def config(self) -> DecoderConfig:
        """The decoder's sizes and constants."""
        return self.decoder.config

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        cache_spec: tq.CacheSpec,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        key: jax.Array | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> str:
        """Generate the assistant's next message.

        Args:
            messages: The conversation; each message has "role" ("system", "user" or "assistant") and "content".
            cache_spec: Spec of the cache of one layer.
            max_new_tokens: Largest number of tokens of the answer.
            sampling: How tokens are drawn; None is greedy.
            key: Random key; required unless sampling is greedy.
            mesh: Devices that compute together, see `generate`.

        Returns:
            The text of the answer, without special tokens.

        Raises:
            ValueError: If the model has no chat template, or if `generate` refuses the arguments.
        """
        tokens, lengths = pad_prompts([self.tokenizer.encode_chat(messages)])
        answer = generate(
            self.decoder,
            tokens,
            lengths,
            cache_spec=cache_spec,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=self.config.stop_tokens,
            key=key,
            mesh=mesh,
        )
        return self.tokenizer.decode(answer.sequences()[0])


def load_model(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: Any = "float32",
    max_context: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LanguageModel:
    """Load a decoder and its tokenizer.

    Args:
        path: A Hugging Face directory (safetensors) or a GGUF file; None is SmolLM2-135M-Instruct, downloaded once.
            GGUF files are dequantized once, to a directory below `cache_dir`.
        dtype: Type of parameters and activations.
        max_context: Tokens that are ever attended over, see `load_decoder`.
        mesh: Devices on which the parameters are placed, see `load_decoder`.

    Returns:
        The model. A second load of the default model takes about a second.

    Raises:
        ConnectionError: If the default model could not be downloaded.
        FileNotFoundError: If there is no such file or directory, or if the directory lacks a file.
        NotImplementedError: For an architecture, option, tensor or tokenizer that is not supported.
        ValueError: If a file is corrupt or truncated.
    """
    path = fetch_default_model() if path is None else Path(path)
    directory = path if path.is_dir() else convert_gguf(path)
    decoder = load_decoder(directory, dtype=dtype, max_context=max_context, mesh=mesh)
    return LanguageModel(decoder=decoder, tokenizer=load_tokenizer(directory))
