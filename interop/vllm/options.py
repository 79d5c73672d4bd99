"""The options of the backend, from vLLM's `--additional-config`."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # the front end of vLLM reads options and must not import JAX
    from tq_jax import QuantizerSpec

SECTION = "tq_jax"
"""Key of the options in the additional configuration."""

KeyKind = Literal["mse", "prod"]
ValueKind = Literal["mse", "group"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How layers are compressed.

    Attributes:
        key_bits: Bits per key coordinate, as in `tq_jax.QuantizerSpec`.
        value_bits: Bits per value coordinate.
        key_kind: Kind of the key quantizer.
        value_kind: Kind of the value quantizer.
        search: Whether the quantization step of each vector is searched; kinds without a search ignore it.
        boundary_layers: How many layers at each end of the model stay in full precision.
        skip_sliding_window: Whether layers with a sliding window stay in full precision in models that also have layers
            without one.
        window: How many of the latest tokens of a request are read in full precision, in whole blocks; 0 for none.
        sinks: First tokens of a request that are read in full precision, with the rest of their block; 0 for none.
        statistics: File of key statistics. If None, the file that `tq-jax calibrate` wrote for this model, see
            `tq_jax.statistics_files`; without one, keys that have a bias are centred by statistics from the model's
            weights.
        seed: Seed of the key quantizers; values use seed + 1.
        precise: Two-byte arithmetic in the GPU kernels, see `tq_jax.attend`.

    Example:
        >>> Options.from_config({"tq_jax": {"key_bits": 3}}).label
        'K3/V4'
    """

    key_bits: float = 4
    value_bits: float = 4
    key_kind: KeyKind = "mse"
    value_kind: ValueKind = "mse"
    search: bool = True
    boundary_layers: int = 0
    skip_sliding_window: bool = True
    window: int = 128
    sinks: int = 4
    statistics: str | None = None
    seed: int = 0
    precise: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    @classmethod
    def from_config(cls, additional_config: Any) -> "Options":
        """Reads the options from an additional configuration; an option that is not given has its default.

        Raises:
            ValueError: For an unknown option, or a value of the wrong type or outside its set.
        """
        given = additional_config.get(SECTION, {}) if isinstance(additional_config, dict) else {}
        if not isinstance(given, dict):
            raise ValueError(f"expected {SECTION!r} in the additional config to be a table of options, got {given!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"expected {SECTION} options among {known}, got {unknown}")
        return cls(**given)

    @property
    def label(self) -> str:
        """Kinds and bits in short, like K3/V4."""
        kinds = (
            f"{letter}{bits:g}{'' if kind == 'mse' else f' ({kind})'}"
            for letter, bits, kind in (
                ("K", self.key_bits, self.key_kind),
                ("V", self.value_bits, self.value_kind),
            )
        )
        return "/".join(kinds)

    def quantizers(self, head_dim: int) -> "tuple[QuantizerSpec, QuantizerSpec]":
        """Specs of the quantizers of keys and values.

        Args:
            head_dim: Dimension of a head.

        Raises:
            ValueError: For values that `tq_jax.QuantizerSpec` refuses.
            NotImplementedError: For dimensions and bits that `tq_jax.QuantizerSpec` does not support.
        """
        from tq_jax import recommended_quantizers

        return recommended_quantizers(
            head_dim, self.key_bits, self.value_bits,
            key_kind=self.key_kind, value_kind=self.value_kind, search=self.search,
        )  # fmt: skip

    def compressed(self, layer: int, layers: int, *, beside_full: bool = False) -> bool:
        """Whether a layer is compressed.

        Args:
            layer: Index of the layer.
            layers: Layers of the model.
            beside_full: Whether this layer has a sliding window and other layers of the model have none.
        """
        inner = self.boundary_layers <= layer < layers - self.boundary_layers
        return inner and not (beside_full and self.skip_sliding_window)

    def content_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes per KV head and token in vLLM: codes and scales, padded to whole elements of the model's type."""
        stored = sum(spec.bytes_per_vector for spec in self.quantizers(head_dim))
        return -(-stored // itemsize) * itemsize


def _check(name: str, value: Any) -> None:
    """Raises ValueError for a value of the wrong type or outside its set."""
    kinds = {"key_kind": KeyKind, "value_kind": ValueKind}
    if name in kinds:
        if value not in get_args(kinds[name]):
            raise ValueError(f"expected {name} in {get_args(kinds[name])}, got {value!r}")
    elif name == "statistics":
        if not isinstance(value, str | None):
            raise ValueError(f"expected statistics to be a path, got {value!r}")
    elif name in ("search", "precise", "skip_sliding_window"):
        if not isinstance(value, bool):
            raise ValueError(f"expected {name} to be true or false, got {value!r}")
    elif name in ("boundary_layers", "window", "sinks", "seed"):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"expected {name} to be an integer of at least 0, got {value!r}")
    elif not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"expected {name} to be a number of bits, got {value!r}")
