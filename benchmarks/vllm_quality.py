"""What the cache costs in vLLM itself: divergence of its next-token distributions from those of vLLM in full precision.

python benchmarks/vllm_quality.py --json vllm_quality.json

Needs vLLM, and no GPU. A text is one request. Its first part runs at once, as a prompt; the rest runs in chunks, and
every prediction in the rest counts. A chunk of one token is a decoding step: it reads all of its tokens from the cache.
A longer chunk is one of a prompt: its tokens see each other as they are, and earlier tokens by the cache.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # chunks are set, and hidden states are read, in the process of the engine
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(name, value)

import numpy as np
import typer

from interop.vllm.options import SECTION, Options
from tq_jax.commands.eval.texts import load_texts
from tq_jax.commands.inputs import CHARACTERS_PER_TOKEN, require_tokens
from tq_jax.commands.options import JsonTarget, parse_bits, parse_numbers, parse_object
from tq_jax.commands.output import environment, open_console, write_json, write_partial
from tq_jax.models import convert_gguf, fetch_default_model, load_tokenizer

BOUNDS = {"K4/V4": 0.0015, "K3/V3": 0.006}
"""Most nats, as a mean over texts, of caches with a window of at least BOUNDED tokens."""

BOUNDED = 128

Texts = dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        texts: Token ids of each text, prompt + positions.
        prompt: Tokens that run at once.
        arguments: Arguments of vLLM's `LLM` that all engines share.
    """

    texts: Texts
    prompt: int
    arguments: dict[str, Any]


@contextlib.contextmanager
def running(**arguments: Any) -> Iterator[Any]:
    """An engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(**arguments)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def log_probs(engine: Any, ids: list[int], *, prompt: int, chunk: int) -> np.ndarray:
    """Log-probabilities of the token after each token behind the prompt, float32 [positions, vocabulary].

    Args:
        engine: vLLM's `LLM` in this process.
        ids: The text.
        prompt: Tokens that run at once.
        chunk: Tokens of each later step.
    """
    import torch
    from vllm import SamplingParams

    core = engine.llm_engine.engine_core.engine_core
    model, scheduler = core.model_executor.driver_worker.worker.model_runner.model, core.scheduler
    seen: list[Any] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any], hidden: Any) -> None:
        behind = kwargs["positions"] >= prompt
        seen.append((kwargs["positions"][behind].clone(), hidden[behind].clone()))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    scheduler.max_num_scheduled_tokens, steps = prompt, 0
    try:
        sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
        engine.llm_engine.add_request(str(len(ids)), {"prompt_token_ids": ids}, sampling)
        while engine.llm_engine.has_unfinished_requests():
            engine.llm_engine.step()
            scheduler.max_num_scheduled_tokens, steps = chunk, steps + 1
    finally:
        handle.remove()
    positions, hidden = (torch.cat(parts) for parts in zip(*seen, strict=True))
    expected = 1 + -(-(len(ids) - prompt) // chunk)
    if steps != expected or positions.tolist() != list(range(prompt, len(ids))):
        raise RuntimeError(
            f"expected {expected} steps to the end of the text, got {steps} to {positions[-1:].tolist()}"
        )
    with torch.inference_mode():
        return model.compute_logits(hidden).float().log_softmax(-1).cpu().numpy()


def compare(full: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Divergence of distributions, [positions, vocabulary] log-probabilities each."""
    divergence = np.sum(np.exp(full) * (full - found), axis=-1, dtype=np.float64)
    same = full.argmax(-1) == found.argmax(-1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_p999": float(np.quantile(divergence, 0.999)),
        "top1": float(same.mean()),
    }


def statistics_of(engine: Any) -> str:
    """Whether keys have statistics: "file", "bias" or "none"."""
    layers = engine.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    kinds = {layer.impl.statistics_from for layer in layers if hasattr(layer.impl, "statistics_from")}
    if not kinds:
        raise RuntimeError("expected compressed layers, got none")
    return "none" if kinds == {None} else "bias" if kinds == {"their bias"} else "file"


def measure(
    plan: Plan, options: dict[str, Any], chunks: list[int], full: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Rows of one cache: each text, in chunks of each length."""
    chosen = Options.from_config({SECTION: options})
    given = plan.arguments | {"attention_backend": "CUSTOM", "additional_config": {SECTION: options}}
    with running(**given) as engine:
        named = {"cache": chosen.label, "window": getattr(chosen, "window", 0), "sinks": getattr(chosen, "sinks", 0)}
        named |= {"statistics": statistics_of(engine)}
        for chunk in chunks:
            for text, ids in plan.texts.items():
                found = log_probs(engine, ids, prompt=plan.prompt, chunk=chunk)
                yield named | {"chunk": chunk, "text": text} | compare(full[text], found)


def windows(window: int, sinks: int) -> dict[str, int]:
    """The options of a window, if the backend has a window."""
    known = {field.name for field in dataclasses.fields(Options)}
    given = {"window": window, "sinks": sinks}
    if unknown := sorted(name for name, count in given.items() if count and name not in known):
        raise typer.BadParameter(f"expected no --{' and no --'.join(unknown)}: the backend has no such option")
    return {name: count for name, count in given.items() if name in known}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divergence of each cache and chunk as a mean over texts, and whether it is within its bound."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        found.setdefault((row["cache"], row["window"], row["sinks"], row["chunk"]), []).append(row["kl_mean"])
    summary = []
    for (cache, window, sinks, chunk), figures in found.items():
        bound = BOUNDS.get(cache) if window >= BOUNDED else None
        mean = sum(figures) / len(figures)
        summary.append({"cache": cache, "window": window, "sinks": sinks, "chunk": chunk, "kl_mean": mean})
        summary[-1] |= {} if bound is None else {"at_most": bound, "ok": mean <= bound}
    return summary


def main(
    model: Annotated[
        Path | None, typer.Option("--model", help="Directory of a model; by default SmolLM2-135M, downloaded.")
    ] = None,
    bits: Annotated[str, typer.Option("--bits", help="Key/value bits.")] = "4/4,3/3,2/2",
    window: Annotated[int, typer.Option("--window", help="Latest tokens in full precision.", min=0)] = 0,
    sinks: Annotated[int, typer.Option("--sinks", help="First tokens in full precision.", min=0)] = 0,
    options: Annotated[str, typer.Option("--options", help="Further options of tq_jax, as JSON.")] = "{}",
    texts: Annotated[str, typer.Option("--texts", help="Texts, as in `tq-jax eval`.")] = "persuasion,pydoc,wiki",
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens that run at once.", min=1)] = 1024,
    positions: Annotated[int, typer.Option("--positions", help="Predictions per text.", min=1)] = 256,
    chunks: Annotated[str, typer.Option("--chunks", help="Tokens of each later step, comma-separated.")] = "64,1",
    dtype: Annotated[str, typer.Option("--dtype", help="Type of weights and activations.")] = "float32",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the rows that the file has of other windows.")] = False,
    target: JsonTarget = None,
) -> None:
    """Compare vLLM over compressed caches with vLLM in full precision, on a model and some texts."""
    folder, console = model or convert_gguf(fetch_default_model()), open_console(target)
    tokenizer, count = load_tokenizer(folder), prompt + positions
    ids = {
        name: tokenizer.encode(content[: CHARACTERS_PER_TOKEN * count])[:count]
        for name, content in load_texts(texts.split(",")).items()
    }
    for name, found in ids.items():
        require_tokens(f"text {name!r}", len(found), count)
    shared = {
        "model": str(folder), "dtype": dtype, "seed": 0, "max_model_len": count + 1, "max_num_seqs": 1,
        "max_num_batched_tokens": max(prompt, *(lengths := parse_numbers(chunks, int))), "block_size": 64,
        "enforce_eager": True, "enable_prefix_caching": False, "skip_tokenizer_init": True, "async_scheduling": False,
        "kv_cache_memory_bytes": 1 << 28, "generation_config": "vllm",
    }  # fmt: skip
    plan = Plan(ids, prompt, shared)
    more = windows(window, sinks) | parse_object(options, "--options")
    payload = where() | {"model": folder.name, "dtype": dtype, "prompt": prompt, "positions": positions}
    rows = known(target, window) if keep else []
    with running(**shared) as engine:
        full = {name: log_probs(engine, text, prompt=prompt, chunk=max(lengths)) for name, text in ids.items()}
    for key_bits, value_bits in parse_bits(bits):
        given = {"key_bits": key_bits, "value_bits": value_bits} | more
        for row in measure(plan, given, lengths, full):
            rows.append(row | {"commit": payload["commit"]})
            console.print(str(row), highlight=False, soft_wrap=True)
            write_partial(payload, rows, target)
    for mean in (summary := means(rows)):
        console.print(str(mean), highlight=False, soft_wrap=True)
    write_json(payload | {"rows": rows, "means": summary, "complete": True}, target)
    raise typer.Exit(int(not all(mean.get("ok", True) for mean in summary)))


def where() -> dict[str, Any]:
    """Where figures come from."""
    import torch
    import vllm

    found = environment(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    return found | {"versions": found["versions"] | {"vllm": vllm.__version__}}


def known(target: str | None, window: int) -> list[dict[str, Any]]:
    """Rows of a file that are of other windows."""
    if target in (None, "-") or not Path(str(target)).is_file():
        return []
    return [row for row in json.loads(Path(str(target)).read_text("utf-8"))["rows"] if row["window"] != window]


if __name__ == "__main__":
    typer.run(main)
