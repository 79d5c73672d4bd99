"""Key statistics of a Hugging Face model, taken once and kept in a file, for caches that cannot use those of a prompt.

A serving engine shares the pages of a prefix among requests, so all requests must centre and weight their keys by the
same statistics; see `tq_jax.statistics` and the option `statistics` of `interop.vllm`. `tq-jax calibrate MODEL` makes
the file where it is found (`interop.hf.calibrate_command`); this module also runs with a file to write:

    python -m interop.hf.calibrate MODEL keys.safetensors [--text FILE] [--tokens 2048]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tq_jax as tq
from interop.hf.capture import capture
from interop.torch.key_statistics import ObservedKeys
from tq_jax.data import persuasion
from tq_jax.statistics import MIN_TOKENS
from tq_jax.statistics_files import key_traits

FIRST_TOKENS = 4
"""Tokens that are left out at the start of a text: their keys are unlike all others."""

ABOUT = "Runs a Hugging Face model over some text and saves mean and channel weights of the keys of each layer."
"""Description of the command."""


def calibrate(
    model: PreTrainedModel,
    ids: torch.Tensor | Sequence[torch.Tensor],
    path: str | Path,
    *,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Runs a model over some texts and saves mean and channel weights of the keys of each layer.

    Layers without keys, such as those of linear attention, get a mean of 0 and weights of 1.

    Args:
        model: Any model that `interop.hf.capture` can record and whose layers have keys of one shape.
        ids: Token ids [texts, tokens] without padding, or texts of different lengths; a few thousand tokens like those
            that the model will see.
        path: File to write, see `tq_jax.save_statistics`.
        advance: Called after every text.

    Raises:
        ValueError: For too few tokens, or for layers with keys of different shapes.

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
    _require_enough([len(text) for text in ids])
    seen: dict[int, ObservedKeys] = {}
    shapes: set[tuple[int, ...]] = set()
    body: Any = model.base_model  # without the head: nobody needs logits over the vocabulary
    for text in ids:
        with capture(model) as captured, torch.inference_mode():
            body(text[None].to(model.device), use_cache=False)
        for layer, keys in captured.keys.items():
            seen.setdefault(layer, ObservedKeys()).add(
                captured.queries[layer][0, FIRST_TOKENS:], keys[0, FIRST_TOKENS:]
            )
            shapes.add(tuple(keys.shape[2:]))
        advance()
    traits = key_traits(model.config)
    expected = (traits["kv_heads"], traits["head_dim"])
    if shapes != {expected}:
        raise ValueError(f"expected layers with keys [h_kv, d] of one shape, {expected}, got {sorted(shapes)}")
    mean, weight = (np.full((traits["layers"], *expected), value, np.float32) for value in (0, 1))
    for layer, keys in seen.items():
        mean[layer], weight[layer] = keys.statistics()
    tq.save_statistics(mean, weight, path, model=traits)


def _require_enough(sizes: Sequence[int]) -> None:
    """Raises ValueError for texts of so few tokens that statistics of them would mean nothing."""
    if sum(max(0, size - FIRST_TOKENS) for size in sizes) < MIN_TOKENS:
        raise ValueError(
            f"expected at least {MIN_TOKENS} tokens after the first {FIRST_TOKENS} of each text, got texts of {sizes}"
        )


def main(prog: str = "python -m interop.hf.calibrate") -> None:
    """Runs the command on the arguments of the process; mistakes in them end it with one sentence and exit code 2.

    Args:
        prog: Command line that the help text names.
    """
    import typer  # only the commands need it

    from tq_jax.commands.inputs import read_text
    from tq_jax.commands.options import refusing, require_writable

    parser = argparse.ArgumentParser(prog=prog, description=ABOUT)
    parser.add_argument("model", help="directory or name of a model, as transformers takes it")
    parser.add_argument("path", help="file to write, *.safetensors")
    parser.add_argument("--text", help="file of text like the text that the model will see (default: Persuasion)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text to read (default: 2048)")
    given = parser.parse_args()
    try:
        require_writable(Path(given.path))
        text = persuasion() if given.text is None else read_text(Path(given.text))
        with refusing("torch,hf"):
            tokenizer = AutoTokenizer.from_pretrained(given.model)
            ids = tokenizer(text[: 20 * given.tokens], return_tensors="pt")["input_ids"][:, : max(given.tokens, 0)]
            _require_enough([ids.shape[1]])
            model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
            calibrate(model, ids, given.path)
    except typer.BadParameter as error:
        parser.error(error.message)


if __name__ == "__main__":
    main()
