"""`tq-jax doctor`: what this machine has, which implementation runs each case and why, and whether attention works."""

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

from pallas_kernels.attention.decode import launch_triton as decode
from pallas_kernels.attention.prefill import launch_triton as prefill
from pallas_kernels.compat.compile import is_known_to_hold, version_note
from pallas_kernels.encode import launch_triton as encode
from pallas_kernels.pages import empty_pages
from tq_jax.append import append
from tq_jax.attention import attend
from tq_jax.cache import init_cache
from tq_jax.cache_spec import CacheSpec
from tq_jax.commands.options import JsonTarget
from tq_jax.commands.output import environment, open_console, versions, write_json
from tq_jax.quantizer import QuantizerSpec, encoder, make_quantizer

NVIDIA_DEVICE = Path("/dev/nvidia0")
"""File that exists if the driver has an NVIDIA GPU."""

TOLERANCE = 1e-3
"""Largest relative error of attention against the reference."""

NEEDED_FOR = {
    "torch": "caches of PyTorch models, peers of tq-jax bench",
    "transformers": "Hugging Face caches",
    "vllm": "the vLLM backend",
    "triton": "torch on a GPU, tq-jax gate",
    "faiss-cpu": "peers of tq-jax search",
    "safetensors": "files of caches, indexes and models",
    "tokenizers": "texts for language models and tq-jax search",
    "gguf": "tq-jax demo",
    "matplotlib": "pictures",
}
"""Optional packages, and what each is needed for."""

FORMATS = ("mse 1", "mse 2", "mse 2.5", "mse 3", "mse 3.5", "mse 4", "mse 5", "mse 8", "prod 3", "prod 4", "prod 5")
AXES: dict[str, tuple[Any, ...]] = {
    "head dim": (16, 32, 64, 80, 96, 112, 128, 192, 256, 512),
    "keys": (*FORMATS, "group 4"),
    "values": (*FORMATS, "group 2", "group 4"),
    "queries": (1, 2, 4, 8, 16, 256),
    "group": (1, 2, 4, 5, 8, 16, 32),
    "page size": (8, 16, 32, 64, 128, 256),
}
"""Properties of a call, and values to try; a group is the number of query heads per KV head."""

BASE: dict[str, Any] = dict(zip(AXES, (128, "mse 4", "mse 4", 1, 4, 128), strict=True))
"""Values of the properties that are not being varied."""

OPERATIONS: dict[str, dict[str, Any]] = {"decode": {}, "prefill": {"queries": 256}, "encode": {}}
"""Operations with kernels, and how their cases differ from BASE."""


def doctor(json: JsonTarget = None) -> None:
    """Show what this machine has, which implementation runs each case and why, and whether attention works.

    Exits 0 only if attention over a small compressed cache agrees with the reference.
    """
    console = open_console(json)
    found = environment() | {"backend": jax.default_backend(), "gpu": describe_gpu()}
    found["unseen_gpu"] = unseen_gpu()
    found["packages"] = {name: version(name) for name in NEEDED_FOR}
    triton = found["packages"]["triton"]
    found["gate_known_to_hold"] = triton and is_known_to_hold(triton)
    found["kernels"] = {op: list(kernel_axes(op)) for op in OPERATIONS}
    found["check"] = check_attention()
    found["ok"] = found["check"]["ok"]
    print_findings(found, console)
    write_json(found, json)
    if not found["ok"]:
        raise typer.Exit(1)


def version(name: str) -> str | None:
    """Version of a package; None if the package is not installed."""
    return versions([name]).get(name)


def describe_gpu() -> dict[str, Any] | None:
    """The first GPU that JAX sees; None if it sees none."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    return {
        "kind": device.device_kind,
        "count": jax.device_count(),
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "bytes": (device.memory_stats() or {}).get("bytes_limit"),
    }


def unseen_gpu() -> str | None:
    """How to let JAX use an NVIDIA GPU of this machine that it does not see; None if there is no such GPU."""
    if jax.default_backend() == "gpu" or not (NVIDIA_DEVICE.exists() or shutil.which("nvidia-smi")):
        return None
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return f"unset JAX_PLATFORMS={platforms}"
    return "pip install 'jax[cuda13]'"


def kernel_axes(op: str) -> Iterator[dict[str, Any]]:
    """Yields, for each axis, the values that an operation's kernel supports, and why it does not support the others."""
    for axis, values in AXES.items():
        if op == "encode" and axis in ("queries", "group"):
            continue
        verdicts = {str(value): why_not(op, BASE | OPERATIONS[op] | {axis: value}) for value in values}
        kernel = [value for value, reason in verdicts.items() if reason is None]
        reference = {value: reason for value, reason in verdicts.items() if reason is not None}
        yield {"axis": axis, "triton": kernel, "reference": reference}


def why_not(op: str, case: dict[str, Any]) -> str | None:
    """Why the kernel of an operation does not support a case; None if it does."""
    try:
        specs = [_spec(case["head dim"], case[name]) for name in ("keys", "values")]
        keys, values = (spec.format for spec in specs)
        pools = jax.eval_shape(lambda: empty_pages(1, 1, case["page size"], keys, values))
        if op == "encode":
            key, value = jax.eval_shape(lambda: [encoder(make_quantizer(spec)) for spec in specs])
            encode.check_supported(pools, key, value)
        else:
            query = (1, case["queries"], case["group"], case["head dim"])
            {"decode": decode, "prefill": prefill}[op].check_supported(query, pools, keys, values, None)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return None


def _spec(dim: int, name: str) -> QuantizerSpec:
    kind, bits = name.split()
    return QuantizerSpec(dim, float(bits), kind=kind)  # pyright: ignore[reportArgumentType]


def check_attention() -> dict[str, Any]:
    """Attends over a small compressed cache with implementation "auto", and compares the result with the reference.

    Without a GPU, "auto" is the reference itself, so that the error is 0 if attention runs.
    """
    quantizer = QuantizerSpec(64, 4)
    spec = CacheSpec(num_kv_heads=2, head_dim=64, max_tokens=512, key=quantizer, value=quantizer)
    key, value, query = jax.random.normal(jax.random.key(0), (3, 1, 300, 2, 64))
    cache = append(init_cache(spec, batch=1), key, value)
    query = jnp.repeat(query[:, -1:], 4, axis=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = attend(query, cache)
    want = attend(query, cache, implementation="reference")
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    notes = [str(warning.message) for warning in caught if "reference" in str(warning.message)]
    return {"error": error, "tolerance": TOLERANCE, "warnings": notes, "ok": error <= TOLERANCE}


def print_findings(found: dict[str, Any], console: Console) -> None:
    """Prints the findings for a reader."""
    line = lambda name, text: console.print(f"[bold]{name:>14}[/bold]  {text}", highlight=False)  # noqa: E731
    line("device", found["device"])
    if found["gpu"]:
        gpu = found["gpu"]
        line("GPU", f"{gpu['count']} x {gpu['kind']}, compute capability {gpu['compute_capability']}")
    line("versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items()))
    line("commit", found["commit"] or "unknown")
    for name, number in found["packages"].items():
        note = f"; {version_note(number)}" if name == "triton" and number else ""
        line(name, f"{number or 'not installed'} ({NEEDED_FOR[name]}{note})")
    if found["gpu"]:
        where = "Kernels run"
    elif found["unseen_gpu"]:
        where = (
            f"JAX sees no GPU: {found['unseen_gpu']}. Until then everything runs on the reference. Kernels would run"
        )
    else:
        where = "No NVIDIA GPU: everything runs on the reference. With a GPU, kernels would run"
    console.print(f"\n{where} these cases; the slow reference runs the cases that say so:", markup=False)
    for op, axes in found["kernels"].items():
        console.print(f"[bold]{op}[/bold]")
        for axis in axes:
            line(axis["axis"], ", ".join(axis["triton"]))
            for value, reason in axis["reference"].items():
                console.print(f"{'':>16}{value}: reference, {reason}", style="yellow", highlight=False, markup=False)
    console.print(f"\n{_verdict(found['check'], gpu=bool(found['gpu']))}")


def _verdict(check: dict[str, Any], *, gpu: bool) -> str:
    """The finding of `check_attention` in one sentence."""
    if check["ok"] and not gpu:
        return "Attention works: the reference runs. Without a GPU there is no kernel to compare it with."
    verdict = "works" if check["ok"] else "FAILS"
    return f"Attention {verdict}: relative error {check['error']:.1e} to the reference (at most {check['tolerance']})"
