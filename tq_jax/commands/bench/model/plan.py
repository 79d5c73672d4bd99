"""What `tq-jax bench model` measures: its options, checked before any work, and the tasks that follow from them."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from tq_jax.commands.bench.model.caches import Kind, parse_kinds
from tq_jax.commands.bench.model.placement import ONE_DEVICE, Placement, parse_mesh
from tq_jax.commands.bench.model.shapes import SHAPES
from tq_jax.commands.inputs import open_model
from tq_jax.commands.options import parse_numbers, require_known
from tq_jax.models import Decoder, DecoderConfig

PANEL = "Options of the operation model"
LEAST, MOST = 256, 2**20
"""Fewest and most tokens of a context."""

FILLS = ("random", "prompt")

MANY_CAPACITY = 1024
"""Tokens that a row has room for where many mixed prompts run."""


def _option(help: str, *names: str, **fields: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL, **fields)


ShapeNames = Annotated[
    str | None, _option(f"Published sizes, random weights, comma-separated: {', '.join(SHAPES)}.", metavar="NAMES")
]
ModelFile = Annotated[
    str | None, _option("GGUF file or Hugging Face directory whose weights run instead.", metavar="PATH")
]
Contexts = Annotated[
    str | None, _option(f"Tokens that a step attends to, comma-separated, {LEAST} to {MOST:,}.", metavar="TOKENS")
]
Batches = Annotated[str | None, _option("Numbers of sequences, comma-separated.", metavar="NUMBERS")]
Caches = Annotated[
    str | None, _option("Caches, comma-separated: bf16, or key and value bits like K4V4.", metavar="KINDS")
]
Prompts = Annotated[
    str | None, _option("Tokens of prompts to time, comma-separated; none: no prompt.", metavar="TOKENS")
]
Many = Annotated[
    int | None, _option("Rows over which 200 mixed prompts run, one prompt after the other; 0: none.", min=0)
]
Steps = Annotated[int | None, _option("Tokens that one run of the decode loop draws.", min=2, max=LEAST // 2)]
Capacity = Annotated[
    int | None, _option("Tokens that a sequence of the cache has room for; the context by default.", min=1)
]
Fill = Annotated[
    str, _option("How a cache is filled: with random keys and values, or by a prompt.", metavar="|".join(FILLS))
]
Mesh = Annotated[
    str | None, _option("Mesh of several devices, like heads=2 or heads=2,sequence=2; else one device.", metavar="AXES")
]
CheckFit = Annotated[
    bool, _option("Also decode with the largest batch and the longest context that are computed to fit.", "--check-fit")
]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Values of the options of `tq-jax bench model`; None if an option is not given."""

    shape: str | None = None
    model: str | None = None
    context: str | None = None
    batch: str | None = None
    cache: str | None = None
    prompt: str | None = None
    many: int | None = None
    steps: int | None = None
    capacity: int | None = None
    fill: str = FILLS[0]
    check_fit: bool = False
    mesh: str | None = None

    def given(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        names = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        return [f"--{name.replace('_', '-')}" for name in names]


@dataclasses.dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        op: "model" for tokens of the decode loop, "prompt" for a prompt, "many" for many mixed prompts.
        shape: Name of the decoder.
        batch: Number of sequences.
        seq: Tokens per sequence: those that the last step attends to, those of the prompt, or those it has room for.
        kind: The cache.
    """

    op: str
    shape: str
    batch: int
    seq: int
    kind: Kind

    @property
    def label(self) -> str:
        """The task in one line."""
        return f"{self.op} {self.shape} {self.batch} x {self.seq}, {self.kind.label}"

    def as_dict(self) -> dict[str, Any]:
        """The task as fields of a row."""
        return {"op": self.op, "shape": self.shape, "batch": self.batch, "seq": self.seq, **self.kind.as_dict()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All tasks and what they have in common.

    Attributes:
        configs: Sizes of each decoder by its name.
        tasks: The tasks, in order.
        kinds: The caches.
        steps: Tokens that one run of the decode loop draws.
        capacity: Tokens that a sequence of the cache has room for; None for the context.
        fill: "random" or "prompt".
        check_fit: Whether the computed largest loads are tried.
        dtype: Type of random weights.
        loaded: The decoder of a file; None if weights are random.
        placement: The devices that compute together.
    """

    configs: dict[str, DecoderConfig]
    tasks: tuple[Task, ...]
    kinds: tuple[Kind, ...]
    steps: int
    capacity: int | None = None
    fill: str = FILLS[0]
    check_fit: bool = False
    dtype: str = "bfloat16"
    loaded: Decoder | None = None
    placement: Placement = ONE_DEVICE


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured if nothing is asked for.

    Attributes:
        loads: Sequences and tokens, by the name of a decoder; "" for all others.
        prompts: Tokens of prompts, in the same form.
        many: Rows over which many mixed prompts run, in the same form.
        kinds: Caches.
        steps: Tokens that one run of the decode loop draws.
        dtype: Type of random weights.
    """

    loads: dict[str, tuple[tuple[int, int], ...]]
    prompts: dict[str, tuple[int, ...]]
    many: dict[str, int]
    kinds: str
    steps: int
    dtype: str


DEFAULTS = {
    True: Defaults(
        loads={
            "": ((1, 1024), (8, 32768), (1, 131072), (64, 4096), (1, 8192), (1, 32768)),
            "smollm2": ((1, 8192),),
        },
        prompts={"": (8192, 32768, 131072), "smollm2": (8192,)},
        many={"": 16},
        kinds="bf16,K4V4,K2V2",
        steps=128,
        dtype="bfloat16",
    ),
    # A CPU computes in float32: it would convert bfloat16 weights again for every token.
    False: Defaults(
        loads={"": ((1, 256), (1, 1024), (1, 4096))},
        prompts={"": (1024,)},
        many={"": 0},
        kinds="bf16,K4V4",
        steps=16,
        dtype="float32",
    ),
}
"""Defaults with a GPU (True) and without (False)."""

DEFAULT_SHAPES = {True: "llama3-8b,smollm2", False: "smollm2"}


def make_plan(asked: Asked, *, gpu: bool) -> Plan:
    """Checks the options and makes the plan.

    Args:
        asked: Values of the options.
        gpu: Whether JAX has a GPU.

    Raises:
        typer.BadParameter: If an option has a value that cannot be measured.
    """
    usual = DEFAULTS[gpu]
    if asked.shape is not None and asked.model is not None:
        raise typer.BadParameter(f"expected --shape or --model, got both, {asked.shape!r} and {asked.model!r}")
    require_known([asked.fill], FILLS, "--fill")
    placement = parse_mesh(asked.mesh, available=jax.device_count())
    if placement.axes and asked.many:
        raise typer.BadParameter(f"expected --many on one device, got --mesh {asked.mesh}")
    kinds = tuple(parse_kinds(asked.cache or usual.kinds))
    steps = asked.steps or usual.steps
    contexts = None if asked.context is None else _tokens("--context", asked.context)
    batches = None if asked.batch is None else _batches(asked.batch)
    prompts = None if asked.prompt is None else _prompts(asked.prompt)
    if asked.capacity is not None and max(contexts or [math.inf]) > asked.capacity:
        raise typer.BadParameter(f"expected --capacity with --context of at most so many tokens, got {asked.capacity}")
    names = require_known((asked.shape or DEFAULT_SHAPES[gpu]).split(","), SHAPES, "shapes")
    configs, loaded = {name: SHAPES[name] for name in names}, None
    if asked.model is not None:
        loaded = open_model(asked.model, dtype=usual.dtype).decoder
        configs = {Path(asked.model).stem: loaded.config}
    tasks = []
    for name in configs:
        loads = usual.loads.get(name, usual.loads[""])
        if contexts or batches:
            loads = tuple((b, c) for b in batches or [1] for c in contexts or sorted({c for _, c in loads}))
        timed = usual.prompts.get(name, usual.prompts[""]) if prompts is None else prompts
        rows = usual.many.get(name, usual.many[""]) if asked.many is None else asked.many
        if contexts or batches:
            timed, rows = () if prompts is None else timed, asked.many or 0
        rows = 0 if placement.axes else rows
        tasks += [Task("prompt", name, b, tokens, _one(kinds)) for b in batches or [1] for tokens in timed]
        tasks += [Task("model", name, *load, kind) for load in loads for kind in kinds]
        tasks += [Task("many", name, rows, MANY_CAPACITY, _one(kinds))] if rows else []
    fields = {"capacity": asked.capacity, "fill": asked.fill, "check_fit": asked.check_fit, "dtype": usual.dtype}
    return Plan(configs, tuple(dict.fromkeys(tasks)), kinds, steps, loaded=loaded, placement=placement, **fields)


def _tokens(option: str, text: str) -> list[int]:
    """The numbers of tokens of an option."""
    found = list(dict.fromkeys(parse_numbers(text, int)))
    if not all(LEAST <= tokens <= MOST for tokens in found):
        raise typer.BadParameter(f"expected {option} of {LEAST} to {MOST} tokens, got {text!r}")
    return found


def _prompts(text: str) -> list[int]:
    """The lengths of prompts to time."""
    return [] if text.strip().lower() in ("", "none") else _tokens("--prompt", text)


def _batches(text: str) -> list[int]:
    """The numbers of sequences."""
    found = list(dict.fromkeys(parse_numbers(text, int)))
    if 0 in found:
        raise typer.BadParameter(f"expected --batch of at least 1, got {text!r}")
    return found


def _one(kinds: tuple[Kind, ...]) -> Kind:
    """The cache that prompts go to: K4/V4 if it is among the caches, otherwise the first."""
    return next((kind for kind in kinds if kind.bits == (4, 4)), kinds[0])


def by_shape(plan: Plan) -> Iterator[tuple[str, list[Task]]]:
    """The tasks of each decoder, one decoder after the other.

    Args:
        plan: The plan.
    """
    for name in plan.configs:
        yield name, [task for task in plan.tasks if task.shape == name]
