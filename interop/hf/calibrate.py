"""Key statistics of a Hugging Face model, taken once and kept in a file, for caches that cannot take a prompt's own.

A serving engine shares the pages of a prefix among requests, so what its keys are centred and weighted by has to be the
same for all of them; see `tq_jax.statistics` and the option `statistics` of `interop.vllm`.

    python -m interop.hf.calibrate MODEL keys.safetensors [--text FILE] [--tokens 2048]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tq_jax as tq
from interop.hf.capture import capture
from interop.torch.key_statistics import key_statistics
from tq_jax.data import persuasion
from tq_jax.statistics import MIN_TOKENS

FIRST_TOKENS = 4
"""Tokens at the start of a text that are left out: their keys are unlike all others."""


def calibrate(model: PreTrainedModel, ids: torch.Tensor, path: str | Path) -> None:
    """Runs a model over some text and saves mean and channel weights of the keys of each layer.

    Args:
        model: Any model that `interop.hf.capture` can record, whose layers have keys of one shape.
        ids: [texts, tokens] without padding; a few thousand tokens of the kind that the model will see.
        path: Where to write, see `tq_jax.save_statistics`.

    Raises:
        ValueError: For too few tokens, or layers of different shapes.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32,
        ...                                      num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     calibrate(model, torch.arange(64)[None] % 32, Path(folder) / "keys.safetensors")
        ...     tq.load_statistics(Path(folder) / "keys.safetensors")[0].shape
        (2, 2, 8)
    """
    texts, tokens = ids.shape
    if texts * (tokens - FIRST_TOKENS) < MIN_TOKENS:
        raise ValueError(
            f"expected at least {MIN_TOKENS} tokens behind the first {FIRST_TOKENS}, got {texts} x {tokens}"
        )
    with capture(model) as captured, torch.inference_mode():
        model(ids)
    shapes = sorted({tuple(x.shape[2:]) for x in captured.keys.values()})
    if len(shapes) != 1 or sorted(captured.keys) != list(range(len(captured.keys))):
        raise ValueError(f"expected layers with keys of one shape, got {shapes} in layers {sorted(captured.keys)}")
    found = [
        key_statistics(*(x[layer][:, FIRST_TOKENS:].flatten(0, 1) for x in (captured.queries, captured.keys)))
        for layer in range(len(captured.keys))
    ]
    mean, weight = (np.stack(arrays) for arrays in zip(*found, strict=True))
    tq.save_statistics(mean, weight, path)


def main() -> None:
    """The command: reads a model and some text, writes the file."""
    parser = argparse.ArgumentParser(prog="python -m interop.hf.calibrate", description=__doc__)
    parser.add_argument("model", help="a directory or name, as transformers takes it")
    parser.add_argument("path", help="the file to write, *.safetensors")
    parser.add_argument("--text", help="a file of text like what the model will see; Persuasion by default")
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    text = persuasion() if given.text is None else Path(given.text).read_text()
    ids = AutoTokenizer.from_pretrained(given.model)(text[: 20 * given.tokens], return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
    calibrate(model, ids[:, : given.tokens], given.path)


if __name__ == "__main__":
    main()
