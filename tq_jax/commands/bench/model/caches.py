"""The caches that are compared: how they are named, made and counted."""

import dataclasses
import re

import jax
import typer

import tq_jax as tq
from tq_jax.commands.options import BITS
from tq_jax.models import DecoderConfig
from tq_jax.models.layer_caches import init_layers

PATTERN = re.compile(r"K([\d.]+)/?V([\d.]+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        bits: Bits per key and per value channel; None for bfloat16.
    """

    bits: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """The kind in a few characters.

        Example:
            >>> Kind((4, 3.5)).label, Kind().label
            ('K4/V3.5', 'bf16')
        """
        return "bf16" if self.bits is None else f"K{self.bits[0]:g}/V{self.bits[1]:g}"

    def as_dict(self) -> dict[str, str]:
        """The kind as fields of a row.

        Example:
            >>> Kind((4, 2)).as_dict()
            {'key': 'mse4', 'value': 'mse2'}
        """
        key, value = ("bf16", "bf16") if self.bits is None else (f"mse{bits:g}" for bits in self.bits)
        return {"key": key, "value": value}

    def spec(self, config: DecoderConfig, max_tokens: int) -> tq.CacheSpec:
        """The spec of a layer's cache: bfloat16, or `CacheSpec.recommended`.

        Args:
            config: Sizes of the decoder.
            max_tokens: Capacity of a cache row, tokens.
        """
        heads, dim = config.num_kv_heads, config.head_dim
        if self.bits is None:
            return tq.CacheSpec.full_precision(num_kv_heads=heads, head_dim=dim, max_tokens=max_tokens)
        return tq.CacheSpec.recommended(heads, dim, max_tokens, *self.bits)

    def nbytes(self, config: DecoderConfig, max_tokens: int, batch: int) -> int:
        """Bytes of a whole cache with all that it owns.

        Args:
            config: Sizes of the decoder.
            max_tokens: Capacity of a cache row, tokens.
            batch: Number of sequences.
        """
        spec = self.spec(config, max_tokens)
        return jax.eval_shape(lambda: init_layers(config, spec, batch=batch)).nbytes

    def read_bytes(self, config: DecoderConfig, tokens: float, batch: int) -> int:
        """Bytes of keys and values that a decoding step must read.

        Sink and window tokens count in full precision, all others as codes with their scales. A layer with a sliding
        window reads the tokens in it. Key statistics and rotations do not count, nor does what the cache has room for.

        Args:
            config: Sizes of the decoder.
            tokens: Tokens per sequence that the step attends to.
            batch: Number of sequences.
        """
        spec = self.spec(config, int(tokens) + 1)
        exact = 2 * spec.num_kv_heads * spec.head_dim * 2
        total = 0.0
        for window in config.layer_windows:
            seen = tokens if window is None else min(tokens, window)
            sinks = spec.sinks if seen == tokens else 0
            whole = seen if not spec.compressed else min(seen, spec.ring + sinks)
            total += whole * exact + (seen - whole) * spec.bytes_per_token()
        return round(batch * total)


def parse_kinds(text: str) -> list[Kind]:
    """Parses kinds of caches like "bf16,K4V4".

    Args:
        text: Value of `--cache`.

    Raises:
        typer.BadParameter: If a part is neither bf16 nor key and value bits that a cache can have.

    Example:
        >>> [kind.label for kind in parse_kinds("bf16,K8V4,k4/v4")]
        ['bf16', 'K8/V4', 'K4/V4']
    """
    kinds = []
    for part in text.split(","):
        found = PATTERN.fullmatch(part.strip())
        try:
            bits = (float(found[1]), float(found[2])) if found else None
        except ValueError:  # two dots in a number
            bits = (-1.0, -1.0)
        if (bits is None and part.strip().lower() != "bf16") or (bits and not BITS.issuperset(bits)):
            known = ", ".join(f"{bits:g}" for bits in sorted(BITS))
            raise typer.BadParameter(f"expected caches like bf16,K4V4 with bits of {known}, got {text!r}")
        kinds.append(Kind(bits))
    return list(dict.fromkeys(kinds))
