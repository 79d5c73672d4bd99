"""`tq-jax hf`: a Hugging Face model directory with its usual cache against compressed ones: text, KL, bytes, time."""

import dataclasses
import statistics
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from interop.hf import ATTENTION, TurboQuantCache
from tq_jax.data import persuasion
from tq_jax.evaluate.report import JsonTarget, environment, open_console, progress_bar, write_json

DEFAULT_BITS = "4/4,3/3"
CHUNK = 16
"""Positions compared at a time; few, so that little leaves the window before its time."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One cache, measured.

    Attributes:
        cache: What it is.
        key_bits: Bits of keys; None for the baseline.
        value_bits: Likewise of values.
        layers: Layers that are compressed.
        nbytes: Bytes of the cache after the text.
        kl_mean: Mean divergence of the next-token distribution from the baseline, nats.
        kl_max: Its largest.
        top1: Share of positions with the baseline's most likely token.
        ms_per_token: Median time of a decoded token.
        text: What the model continued the prompt with.
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


def hf(
    model: Annotated[Path, typer.Argument(help="Directory of a Hugging Face model.", exists=True, file_okay=False)],
    prompt: Annotated[str | None, typer.Option(help="What to continue; the text by default.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; *Persuasion* by default.", exists=True)] = None,
    bits: Annotated[str, typer.Option(help="Key/value bits of each compressed cache, comma-separated.")] = DEFAULT_BITS,
    context: Annotated[int, typer.Option(help="Tokens of the text before the positions compared.", min=1)] = 512,
    positions: Annotated[int, typer.Option(help="Predictions compared.", min=CHUNK)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 32,
    device: Annotated[str, typer.Option(help="Where torch runs the model.")] = "cpu",
    json: JsonTarget = None,
) -> None:
    """Compare a Hugging Face model's usual cache with compressed ones: text, KL, bytes, time.

    Runs the model in transformers with DynamicCache and SDPA, then with TurboQuantCache, on the same text and prompt.
    Exits 0 only if every compressed cache is smaller than the usual one and every divergence is a number.
    """
    console = open_console(json)
    widths = [tuple(float(width) for width in pair.split("/")) for pair in bits.split(",")]
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    network.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    content = text.read_text("utf-8") if text else persuasion()
    ids = tokenizer(content[: 12 * (context + positions)], return_tensors="pt").input_ids[:, : context + positions]
    asked = ids[:, :context] if prompt is None else tokenizer(prompt, return_tensors="pt").input_ids
    reference, rows = None, []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(widths) + 1)
        for pair in (None, *widths):
            progress.update(task, description="baseline" if pair is None else f"K{pair[0]:g}/V{pair[1]:g}")
            reference, row = measure(
                network, tokenizer, ids.to(device), asked.to(device), pair, reference, context, new_tokens
            )
            rows.append(row)
            progress.advance(task)
    holds = all(row.nbytes < rows[0].nbytes and row.kl_mean == row.kl_mean for row in rows[1:])
    console.print(make_table(rows))
    for row in rows:
        console.print(f"[bold]{row.cache:>8}[/bold]  {row.text!r}")
    payload = {"model": str(model), "positions": ids.shape[1] - context, "rows": [dataclasses.asdict(r) for r in rows]}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(payload | {"holds": holds, "environment": environment(), "torch": versions}, json)
    raise typer.Exit(0 if holds else 1)


def measure(
    network: PreTrainedModel,
    tokenizer: Any,
    ids: torch.Tensor,
    asked: torch.Tensor,
    widths: tuple[float, ...] | None,
    reference: torch.Tensor | None,
    context: int,
    new_tokens: int,
) -> tuple[torch.Tensor, Row]:
    """One cache over the text and the prompt.

    Returns:
        Log-probabilities of the positions, those of the baseline if there were some, and the row.
    """
    network.set_attn_implementation("sdpa" if widths is None else ATTENTION)
    cache = make_cache(network, widths)
    with torch.no_grad():
        logits = [network(ids[:, :context], past_key_values=cache, logits_to_keep=1).logits]
        logits += [network(part, past_key_values=cache).logits for part in ids[:, context:].split(CHUNK, dim=1)]
    found = torch.cat(logits, 1)[0, :-1].float().log_softmax(-1)
    exact = found if reference is None else reference
    kl = (exact.exp() * (exact - found)).sum(-1)
    answer, seconds = generate(network, asked, make_cache(network, widths), new_tokens)
    row = Row(
        cache="baseline" if widths is None else f"K{widths[0]:g}/V{widths[1]:g}",
        key_bits=None if widths is None else widths[0],
        value_bits=None if widths is None else widths[1],
        layers=len(cache.compressed_layers) if isinstance(cache, TurboQuantCache) else 0,
        nbytes=cache_bytes(cache),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float((exact.argmax(-1) == found.argmax(-1)).float().mean()),
        ms_per_token=seconds * 1e3,
        text=tokenizer.decode(answer, skip_special_tokens=True),
    )
    return exact, row


def make_cache(network: PreTrainedModel, widths: tuple[float, ...] | None) -> DynamicCache | TurboQuantCache:
    """A new cache: the usual one, or one of some widths."""
    if widths is None:
        return DynamicCache(config=network.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table says how many layers are compressed
        return TurboQuantCache(network.config, key_bits=widths[0], value_bits=widths[1])


def cache_bytes(cache: DynamicCache | TurboQuantCache) -> int:
    """Bytes of all tensors of a cache."""
    if isinstance(cache, TurboQuantCache):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))


def generate(network: PreTrainedModel, asked: torch.Tensor, cache: Any, count: int) -> tuple[list[int], float]:
    """Greedy tokens and the median seconds of one; the first steps, which compile, are in no median of many."""
    tokens, times = [], []
    step = asked
    with torch.no_grad():
        for _ in range(count):
            _wait(asked.device)
            start = time.perf_counter()
            step = network(step, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            tokens.append(int(step))
            times.append(time.perf_counter() - start)
    return tokens, statistics.median(times[1:] or times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_table(rows: list[Row]) -> Table:
    """The figures for a reader."""
    table = Table(title="DynamicCache with SDPA against TurboQuantCache")
    for name in ("cache", "layers", "MiB", "ratio", "KL", "KL max", "same top-1", "ms a token"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        table.add_row(
            row.cache, str(row.layers), f"{row.nbytes / 2**20:.2f}", f"{rows[0].nbytes / row.nbytes:.2f}",
            f"{row.kl_mean:.5f}", f"{row.kl_max:.4f}", f"{row.top1:.1%}", f"{row.ms_per_token:.1f}",
        )  # fmt: skip
    return table
