"""The model that `tq-jax serve-bench` serves: a given one, or a published shape with random weights."""

import json
from pathlib import Path
from typing import Any

import typer

from tq_jax.commands.bench.model.shapes import SHAPES
from tq_jax.models.config_hf import config_to_hf


def model_arguments(model: str | None, shape: str | None, folder: Path) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` that name a model.

    Args:
        model: Directory or name of a model; None for a shape.
        shape: Name of a shape, see `tq_jax.commands.bench.model.shapes`.
        folder: Where to put the configuration of a shape; its weights are random and made by vLLM itself.

    Raises:
        typer.BadParameter: For an unknown shape, or if not exactly one of model and shape is given.

    Example:
        >>> model_arguments("org/model", None, Path())
        {'model': 'org/model'}
    """
    if (model is None) == (shape is None):
        raise typer.BadParameter(f"expected either --model or --shape, got --model {model} and --shape {shape}")
    if shape is None:
        return {"model": model}
    if shape not in SHAPES:
        raise typer.BadParameter(f"expected a shape among {', '.join(SHAPES)}, got {shape!r}")
    config = config_to_hf(SHAPES[shape]) | {"torch_dtype": "bfloat16", "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return {"model": str(folder), "load_format": "dummy"}
