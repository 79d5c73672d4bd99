"""`tq-jax calibrate`: key statistics of a Hugging Face model, written where serving engines find them.

Importing this module needs neither torch nor transformers, so that `tq-jax` can list the command without them.
"""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import typer

from tq_jax.commands.eval.texts import load_text
from tq_jax.commands.inputs import CHARACTERS_PER_TOKEN, require_tokens
from tq_jax.commands.options import JsonTarget, OutputFile, parse_object, refusing
from tq_jax.commands.output import environment, open_console, progress_bar, write_json
from tq_jax.statistics import MIN_TOKENS
from tq_jax.statistics_files import ModelIdentity, find_statistics, identify, read_statistics

if TYPE_CHECKING:
    import torch

TEXTS = "persuasion,pydoc,code"
"""Texts that need no download: a novel, which ships with the package, and a manual and code, which ship with Python."""

START = 0.5
"""Where in a text to start, as a part of its length. `tq-jax eval` measures at the beginning."""


def calibrate(
    model: Annotated[str, typer.Argument(help="Directory or name of a model, as transformers takes it.")],
    output: OutputFile = None,
    texts: Annotated[str, typer.Option(help="Texts of `tq-jax eval` by name, or text files, comma-separated.")] = TEXTS,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.", min=MIN_TOKENS)] = 2048,
    revision: Annotated[str | None, typer.Option(help="Revision of a model of the hub.")] = None,
    overrides: Annotated[
        str, typer.Option(help="Fields of the configuration to change, as JSON, like --hf-overrides of vLLM.")
    ] = "{}",
    device: Annotated[str, typer.Option(help="Device on which torch runs the model.")] = "cpu",
    json: JsonTarget = None,
) -> None:
    """Run a model over some texts and save mean and channel weights of its keys, for caches of serving engines.

    Without --output, the file is written beside the model if that folder can be written, else into the cache directory
    ($TQ_JAX_CACHE or ~/.cache/tq-jax) under the model's name and revision; the vLLM backend finds it there. Exits 0
    only if the file is there and reads back as statistics of this model.
    """
    console, started = open_console(json), time.monotonic()
    if jax.config.jax_platforms is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")  # torch runs the model; JAX must not take GPU memory
    contents = {name: load_text(name) for name in texts.split(",")}
    with refusing("torch,hf"):
        from interop.hf.calibrate import calibrate as run

        network, tokenizer = load(model, revision, parse_object(overrides, "--overrides"), device)
    identity = identify(model, network.config, revision=revision)
    ids = [tokenize(network, tokenizer, name, content, tokens) for name, content in contents.items()]
    with refusing("torch,hf"):
        path = identity.writable_place if output is None else output
    with progress_bar(console) as progress, refusing("torch,hf"):
        task = progress.add_task(f"{identity.name}", total=len(ids))
        run(network, ids, path, advance=lambda: progress.advance(task))
        mean, _ = read_statistics(path, identity)
    seconds = time.monotonic() - started
    console.print(f"{path}\n{say(identity, path, sum(map(len, ids)), seconds)}", highlight=False, soft_wrap=True)
    report: dict[str, Any] = {"model": identity.name, "revision": identity.revision, "file": str(path)}
    report |= {
        "traits": identity.traits,
        "shape": list(mean.shape),
        "texts": {name: len(text) for name, text in zip(contents, ids, strict=True)},
    }
    write_json(report | {"seconds": round(seconds, 1), "environment": environment()}, json)


def load(model: str, revision: str | None, overrides: dict[str, Any], device: str) -> tuple[Any, Any]:
    """The model in its own type on a device, and its tokenizer.

    Raises:
        ValueError: For an override of a field that the configuration does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from interop.hf.measure import require_device

    require_device(device)
    config, unused = AutoConfig.from_pretrained(model, revision=revision, return_unused_kwargs=True, **overrides)
    if unused:
        raise ValueError(f"expected fields of {type(config).__name__} in --overrides, got {', '.join(sorted(unused))}")
    network: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision, config=config, dtype="auto")
    return network.to(device).eval(), AutoTokenizer.from_pretrained(model, revision=revision)


def tokenize(network: Any, tokenizer: Any, name: str, content: str, count: int) -> "torch.Tensor":
    """Token ids of a text from `START` on, as many as asked for or as the model's context has room for.

    Raises:
        typer.BadParameter: For a text that is too short.
    """
    room = getattr(network.config.get_text_config(), "max_position_embeddings", None) or count
    start = int(START * max(0, len(content) - CHARACTERS_PER_TOKEN * count))
    part = content[start : start + CHARACTERS_PER_TOKEN * count]
    ids = tokenizer(part, return_tensors="pt").input_ids[0, : min(count, room)]
    require_tokens(f"text {name!r}", len(ids), MIN_TOKENS)
    return ids


def say(identity: ModelIdentity, path: Path, tokens: int, seconds: float) -> str:
    """What was done, and who finds the file."""
    found = None
    with contextlib.suppress(FileNotFoundError):
        found = find_statistics(identity)
    how = (
        "found automatically for this model"
        if found is not None and found.resolve() == path.resolve()
        else f'not found automatically: name it in the option statistics, {{"tq_jax": {{"statistics": "{path}"}}}}'
    )
    return f"statistics of {tokens:,} tokens, {seconds:.0f} s; {how}"
