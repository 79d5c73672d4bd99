"""The measurements of `tq-jax hf --image` and `--video`: an answer about what is shown, with one cache at a time."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from interop.hf.handle import ATTENTION
from interop.hf.layer import CACHE_ARGUMENT
from interop.hf.measure import Row, cache_bytes, label, make_cache, require_device
from tq_jax.commands.options import refusing

Shown = tuple[Literal["image", "video"], Path]
"""A file of an image or a video."""


@dataclasses.dataclass(frozen=True)
class VisionTask:
    """A model with the question that it is asked about images and videos.

    Attributes:
        network: The model.
        processor: What turns text, images and videos into the model's arguments.
        asked: Arguments of `generate`.
        positions: Number of tokens to generate; the predictions compared are those along the baseline's answer.
        attention: The model's own attention implementation, which the baseline uses.
    """

    network: Any
    processor: Any
    asked: dict[str, Any]
    positions: int
    attention: str


def load_task(model: Path, shown: Sequence[Shown], prompt: str, *, new_tokens: int, device: str) -> VisionTask:
    """Loads a model and asks it about images and videos, by its chat template.

    Args:
        model: Directory of the model and its processor.
        shown: Files of images and videos, in the order in which the model is shown them.
        prompt: The question.
        new_tokens: Number of tokens to generate.
        device: Device on which torch runs the model.

    Raises:
        typer.BadParameter: For a directory without such a model, a file that is no image or video, a package that reads
            videos and is missing, or a device that torch does not have.
    """
    require_device(device)
    content = [{"type": kind, "path": str(path)} for kind, path in shown] + [{"type": "text", "text": prompt}]
    with refusing("torch,hf"):
        processor = AutoProcessor.from_pretrained(model)
        network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        asked = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
    attention = network.config._attn_implementation
    return VisionTask(network.to(device).eval(), processor, dict(asked.to(device)), new_tokens, attention)


def measure(task: VisionTask, widths: tuple[float, ...] | None, reference: Any = None) -> tuple[Any, Row]:
    """Measures one cache over the question and its answer.

    Args:
        task: The model with its question.
        widths: Bits of keys and values; None for the usual cache, the baseline, which is measured first.
        reference: What `measure` returned for the baseline; None for the baseline itself.

    Returns:
        Tokens of the baseline's answer with their log-probabilities, and the measurements.

    Raises:
        typer.BadParameter: If the model cannot have the cache.
    """
    if widths is not None:
        task.network.set_attn_implementation(ATTENTION)
    with refusing("torch,hf"):
        cache = make_cache(task.network, widths)
        tokens, logits, seconds = _answer(task, cache)
        answer, exact = (tokens, logits) if reference is None else reference
        if reference is not None:  # along the baseline's answer
            cache = make_cache(task.network, widths)
            logits = _answer(task, cache, answer)[1]
    kl = (exact.exp() * (exact - logits)).sum(-1)
    row = Row(
        cache=label(widths),
        key_bits=None if widths is None else widths[0],
        value_bits=None if widths is None else widths[1],
        layers=len(getattr(cache, "compressed_layers", ())),
        nbytes=cache_bytes(cache),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float((exact.argmax(-1) == logits.argmax(-1)).float().mean()),
        ms_per_token=seconds * 1e3,
        text=task.processor.decode(tokens, skip_special_tokens=True),
    )
    return (answer, exact), row


def _answer(
    task: VisionTask, cache: Any, forced: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Generates greedily, or the forced tokens: tokens [t], their log-probabilities [t, vocabulary], s per token."""
    clock = _Clock()
    out = task.network.generate(
        **task.asked, **{CACHE_ARGUMENT: cache}, do_sample=False, streamer=clock,
        min_new_tokens=task.positions, max_new_tokens=task.positions,
        logits_processor=[] if forced is None else [_Forced(forced, task.asked["input_ids"].shape[1])],
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = out.sequences[0, -task.positions :]
    return tokens, torch.cat(out.logits).float().log_softmax(-1), clock.seconds


class _Clock(BaseStreamer):
    """Notes when tokens come; the first to come are the prompt's."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def seconds(self) -> float:
        """Median seconds per token, without the first one, which takes the prompt's time."""
        steps = [b - a for a, b in zip(self._times, self._times[1:], strict=False)]
        return statistics.median(steps[1:] or steps)


class _Forced(LogitsProcessor):
    """Makes generation take given tokens."""

    def __init__(self, tokens: torch.Tensor, prompt: int) -> None:
        self._tokens, self._prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        only = torch.full_like(scores, -torch.inf)
        only[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0
        return only
