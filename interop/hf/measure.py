"""The measurements of `tq-jax hf`: one cache of a Hugging Face model at a time, over a text and a prompt."""

import contextlib
import dataclasses
import inspect
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)

from interop.hf.cache import TurboQuantCache
from interop.hf.decoding_graphs import decoding_graphs
from interop.hf.handle import ATTENTION
from interop.hf.layer import CACHE_ARGUMENT, layer_bytes
from tq_jax.commands.inputs import CHARACTERS_PER_TOKEN, require_tokens
from tq_jax.commands.options import refusing

CHUNK = 16
"""Positions per forward pass; few, so that few tokens leave the window earlier than in decoding."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Measurements of one cache.

    Attributes:
        cache: Name of the cache.
        key_bits: Bits per key coordinate; None for the baseline.
        value_bits: Bits per value coordinate; None for the baseline.
        layers: Number of compressed layers.
        nbytes: Bytes of the cache after the text.
        kl_mean: Mean KL divergence of the next-token distribution from the baseline's, in nats.
        kl_max: Largest KL divergence of a position, in nats.
        top1: Share of positions whose most likely token is the baseline's.
        ms_per_token: Median time per decoded token, in milliseconds.
        text: Continuation of the prompt.
    """

    cache: str
    key_bits: float | None
    value_bits: float | None
    layers: int
    nbytes: int
    kl_mean: float
    kl_max: float
    top1: float
    ms_per_token: float
    text: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its text and its prompt.

    Attributes:
        network: The model.
        tokenizer: Tokenizer of the model.
        ids: Token ids of the text [1, context + positions].
        asked: Token ids of the prompt [1, t].
        context: Tokens of the text before the positions compared.
        new_tokens: Number of tokens to generate.
        attention: The model's own attention implementation, which the baseline uses.
        graphs: Whether decoding steps of compressed caches are replayed from CUDA graphs.
        dense: Whether compressed caches return tensors, so that the model's own attention reads them.
    """

    network: Any
    tokenizer: Any
    ids: torch.Tensor
    asked: torch.Tensor
    context: int
    new_tokens: int
    attention: str
    graphs: bool
    dense: bool = False

    @property
    def positions(self) -> int:
        """Number of predictions compared."""
        return self.ids.shape[1] - self.context


def load_task(
    model: Path,
    content: str,
    prompt: str | None,
    *,
    context: int,
    positions: int,
    new_tokens: int,
    device: str,
    graphs: bool,
    dense: bool = False,
) -> Task:
    """Loads a model and tokenizes its text and prompt.

    Args:
        model: Directory of the model.
        content: The text.
        prompt: The prompt; None for the beginning of the text.
        context: Tokens of the text before the positions compared.
        positions: Number of positions compared.
        new_tokens: Number of tokens to generate.
        device: Device on which torch runs the model.
        graphs: Whether decoding steps of compressed caches are replayed from CUDA graphs.
        dense: Whether compressed caches return tensors, so that the model's own attention reads them.

    Raises:
        typer.BadParameter: For a directory without a model, a device that torch does not have, a text without tokens
            to compare, an empty prompt, or a model whose context is too short for the text or the prompt.
    """
    require_device(device)
    with refusing("torch,hf"):
        network: Any = _auto_class(model).from_pretrained(model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(model)
    text = content[: CHARACTERS_PER_TOKEN * (context + positions)]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : context + positions].to(device)
    asked = ids[:, :context] if prompt is None else tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    if ids.shape[1] <= context:
        raise typer.BadParameter(f"expected a text of more than context={context} tokens, got {ids.shape[1]}")
    if not asked.shape[1]:
        raise typer.BadParameter(f"expected a prompt of at least one token, got {prompt!r}")
    room = getattr(network.config.get_text_config(), "max_position_embeddings", None) or math.inf
    require_tokens("the model's context", room, max(ids.shape[1], asked.shape[1] + new_tokens))
    attention = network.config._attn_implementation
    return Task(network.to(device).eval(), tokenizer, ids, asked, context, new_tokens, attention, graphs, dense)


def _auto_class(model: Path) -> Any:
    """The class that loads a model: vision-language models are not in the list of those that read text alone."""
    kind = type(AutoConfig.from_pretrained(model))
    sees = kind in AutoModelForImageTextToText._model_mapping and kind not in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def require_device(name: str) -> None:
    """Raises typer.BadParameter for a device that torch does not have."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the kind of device
        raise typer.BadParameter(f"expected a device that torch has, got {name!r} ({error})") from error


def require_supported(task: Task, widths: Sequence[tuple[float, float]]) -> None:
    """Runs one token with every compressed cache, before any long run starts.

    Raises:
        typer.BadParameter: If the model's heads cannot have such bits, or its decoding steps cannot be CUDA graphs.
    """
    with refusing("torch,hf"):
        caches = [make_cache(task.network, pair, dense=task.dense) for pair in widths]
    if not task.dense:
        task.network.set_attn_implementation(ATTENTION)
    for cache in caches:
        with refusing("torch,hf"), torch.no_grad(), steps(task, cache):
            task.network(task.ids[:, :1], **{CACHE_ARGUMENT: cache})


def versions() -> dict[str, str]:
    """Versions of torch and transformers."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def measure(task: Task, widths: tuple[float, ...] | None, reference: Any = None) -> tuple[torch.Tensor, Row]:
    """Measures one cache over the text and the prompt.

    Args:
        task: The model with its text and its prompt.
        widths: Bits of keys and values; None for the usual cache, the baseline.
        reference: Log-probabilities that `measure` returned for the baseline; None for the baseline itself.

    Returns:
        Log-probabilities of the baseline at the positions compared, and the measurements.
    """
    network, ids = task.network, task.ids
    if not task.dense:
        network.set_attn_implementation(task.attention if widths is None else ATTENTION)
    cache = make_cache(network, widths, dense=task.dense)
    given = {CACHE_ARGUMENT: cache}
    with torch.no_grad():
        logits = [network(ids[:, : task.context], **given, **last_logits(network)).logits[:, -1:]]
        logits += [network(part, **given).logits for part in ids[:, task.context :].split(CHUNK, dim=1)]
    found = torch.cat(logits, 1)[0, :-1].float().log_softmax(-1)
    exact = found if reference is None else reference
    kl = (exact.exp() * (exact - found)).sum(-1)
    new = make_cache(network, widths, dense=task.dense)
    with refusing("torch,hf"), steps(task, new):
        answer, seconds = generate(network, task.asked, new, task.new_tokens)
    row = Row(
        cache=label(widths),
        key_bits=None if widths is None else widths[0],
        value_bits=None if widths is None else widths[1],
        layers=len(cache.compressed_layers) if isinstance(cache, TurboQuantCache) else 0,
        nbytes=cache_bytes(cache),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float((exact.argmax(-1) == found.argmax(-1)).float().mean()),
        ms_per_token=seconds * 1e3,
        text=task.tokenizer.decode(answer, skip_special_tokens=True),
    )
    return exact, row


def steps(task: Task, cache: Any) -> contextlib.AbstractContextManager[None]:
    """Replays decoding steps of a compressed cache from CUDA graphs in the block, if the task wants that."""
    wanted = task.graphs and isinstance(cache, TurboQuantCache)
    return decoding_graphs(task.network, cache) if wanted else contextlib.nullcontext()


def make_cache(
    network: PreTrainedModel, widths: tuple[float, ...] | None, *, dense: bool = False
) -> DynamicCache | TurboQuantCache:
    """A new cache: a compressed one with these bits of keys and values, or the usual one for None."""
    if widths is None:
        return DynamicCache(config=network.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table says how many layers are compressed
        return TurboQuantCache(network.config, key_bits=widths[0], value_bits=widths[1], dense=dense)


def label(widths: tuple[float, ...] | None) -> str:
    """Name of a cache of these bits of keys and values; None is the baseline."""
    return "baseline" if widths is None else f"K{widths[0]:g}/V{widths[1]:g}"


def cache_bytes(cache: DynamicCache | TurboQuantCache) -> int:
    """Bytes of all tensors of a cache."""
    if isinstance(cache, TurboQuantCache):
        return cache.nbytes
    return sum(layer_bytes(layer) for layer in cache.layers)


def generate(network: PreTrainedModel, asked: torch.Tensor, cache: Any, count: int) -> tuple[list[int], float]:
    """Greedy tokens, and the median seconds per token without the first step, which compiles."""
    tokens, times = [], []
    step = asked
    given = {CACHE_ARGUMENT: cache} | last_logits(network)
    with torch.no_grad():
        for _ in range(count):
            _wait(asked.device)
            start = time.perf_counter()
            step = network(step, **given).logits[:, -1:].argmax(-1)
            tokens.append(int(step))
            times.append(time.perf_counter() - start)
    return tokens, statistics.median(times[1:] or times)


def last_logits(network: PreTrainedModel) -> dict[str, int]:
    """Arguments by which a model computes the logits of the last token alone; none if it cannot."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
