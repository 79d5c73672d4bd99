"""The KV caches that `tq-jax serve-bench` compares: how they are named, and what vLLM is told."""

import dataclasses
from typing import Any

import typer

from interop.vllm.options import SECTION, Options
from tq_jax.commands.options import parse_bits

OURS = "tq_jax"
"""Name of this package's backend in rows."""

PRESETS = "turboquant"
"""Name of vLLM's own TurboQuant backend in rows; what follows it is one of vLLM's presets, such as 4bit_nc."""

ANY = "auto"
"""Stands for the backend that vLLM chooses."""

FULL = "bf16"
"""Name of a cache in the model's own type."""

DEFAULT = (
    "tq_jax:4/4,tq_jax:3/3,tq_jax:2/2,flash_attn,flash_attn:fp8,turboquant:4bit_nc,triton_attn:int4_per_token_head"
)
"""Every kind of cache that vLLM 0.32 has for plain attention on an H200, and this package's."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A KV cache of vLLM.

    Attributes:
        backend: Name of the backend in rows.
        kv: Name of the cache's type in rows.
        attention: vLLM's name of the backend; None for the one that vLLM chooses.
        cache_dtype: vLLM's name of the cache's type.
        options: Options of this package's backend.
    """

    backend: str
    kv: str
    attention: str | None
    cache_dtype: str = "auto"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The names of backend and type."""
        return f"{self.backend} {self.kv}"

    @property
    def window(self) -> int:
        """Latest tokens in full precision."""
        return Options(**self.options).window if self.backend == OURS else 0

    @property
    def fields(self) -> dict[str, Any]:
        """The fields by which rows name the cache."""
        return {"op": "vllm", "backend": self.backend, "kv": self.kv, "window": self.window}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's `LLM`."""
        given: dict[str, Any] = {"kv_cache_dtype": self.cache_dtype}
        if self.attention is not None and self.backend != PRESETS:
            given["attention_backend"] = self.attention
        if self.backend == OURS:
            given["additional_config"] = {SECTION: self.options}
        return given


def parse_choices(text: str, options: dict[str, Any]) -> list[Choice]:
    """Parses names such as "tq_jax:4/4,flash_attn,flash_attn:fp8,turboquant:4bit_nc".

    Args:
        text: Names, comma-separated: tq_jax:KEY_BITS/VALUE_BITS, turboquant:PRESET, auto, or a backend of vLLM in lower
            case; the last two may be followed by a KV-cache type of vLLM.
        options: Further options of this package's backend, for every cache of it.

    Raises:
        typer.BadParameter: For a name of another form, options that the backend refuses, or a name given twice.

    Example:
        >>> [choice.label for choice in parse_choices("tq_jax:3/2,flash_attn,flash_attn:fp8,turboquant:k8v4", {})]
        ['tq_jax k3v2', 'flash_attn bf16', 'flash_attn fp8', 'turboquant k8v4']
    """
    found = [_parse(name.strip(), options) for name in text.split(",")]
    labels = [choice.label for choice in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise typer.BadParameter(f"expected each cache once, got {', '.join(twice)} more than once")
    return found


def _parse(name: str, options: dict[str, Any]) -> Choice:
    backend, _, kind = name.partition(":")
    if backend == OURS:
        ((key_bits, value_bits),) = parse_bits(kind or "4/4")
        given = {"key_bits": key_bits, "value_bits": value_bits} | options
        try:
            Options.from_config({SECTION: given})
        except (ValueError, NotImplementedError) as error:
            raise typer.BadParameter(str(error)) from error
        return Choice(OURS, f"k{key_bits:g}v{value_bits:g}", "CUSTOM", options=given)
    if backend == PRESETS and kind:
        return Choice(PRESETS, kind, "TURBOQUANT", f"{PRESETS}_{kind}")
    if not backend.isidentifier() or backend == PRESETS:
        raise typer.BadParameter(f"expected a cache such as {DEFAULT.replace(',', ', ')}, got {name!r}")
    full = kind in ("", FULL)
    attention = None if backend == ANY else backend.upper()
    return Choice(backend, FULL if full else kind, attention, "auto" if full else kind)
