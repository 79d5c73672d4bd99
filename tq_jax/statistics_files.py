"""Where files of key statistics lie, and of which model they are.

`tq-jax calibrate` writes a file beside the model if its folder is writable, else into the cache directory, under the
model's name and revision. Caches that cannot use the statistics of a prompt look there: in the file that an option
names, then beside the model, then in the cache directory. A file says of which model it is: type, layers, KV heads,
head dimension and rotary embedding. A file of another model is refused.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from tq_jax.files import cache_dir, read_header
from tq_jax.store import load_statistics

FILE_NAME = "key_statistics.tq_jax"
"""Name of the file in a model's folder. Loaders would take a file *.safetensors or *.bin for weights of the model."""

COMMAND = "tq-jax calibrate"
"""Command that makes a file; the model follows."""

HUB = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")
"""Path of a model in the cache of the Hugging Face hub."""

RECORDED = {
    0: {"K4/V4": (0.034, 0.022), "K3/V3": (0.18, 0.098)},
    128: {"K4/V4": (0.0021, 0.0012), "K3/V3": (0.012, 0.005)},
}
"""By window and cache, divergence in nats without statistics and with a file's; see `missing_statistics`."""


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """A model, as files of key statistics know it.

    Attributes:
        name: Name in the hub, or the absolute path of a folder.
        revision: Commit or branch in the hub; "" for a folder.
        folder: The folder of a local model; None for a model of the hub.
        traits: Plain data on which the keys depend; see `key_traits`.
    """

    name: str
    revision: str
    folder: Path | None
    traits: dict[str, Any]

    @property
    def places(self) -> list[Path]:
        """Where a file may lie, the most preferred place first."""
        return [*([] if self.folder is None else [self.folder / FILE_NAME]), self._cached]

    @property
    def writable_place(self) -> Path:
        """The most preferred place that can be written; the cache directory is made if it is needed."""
        if self.folder is not None and os.access(self.folder, os.W_OK):
            return self.folder / FILE_NAME
        self._cached.parent.mkdir(parents=True, exist_ok=True)
        return self._cached

    @property
    def command(self) -> str:
        """The command that makes a file for this model."""
        revision = f" --revision {self.revision}" if self.folder is None and self.revision != "main" else ""
        return f"{COMMAND} {shlex.quote(self.name)}{revision}"

    @property
    def _cached(self) -> Path:
        digest = hashlib.sha256(json.dumps([self.name, self.revision, self.traits], sort_keys=True).encode())
        short = re.sub(r"[^\w.-]+", "--", self.name.strip("/"))[-80:]
        return cache_dir() / "statistics" / f"{short}-{digest.hexdigest()[:16]}.tq_jax"


def identify(location: str | Path, config: Any, *, revision: str | None = None) -> ModelIdentity:
    """Says which model this is.

    Args:
        location: Folder of the model, or its name in the hub. A folder in the cache of the hub is its name.
        config: Configuration of the model, by the names of transformers.
        revision: Revision in the hub that was asked for, a commit or a branch; the main branch by default. Where the
            hub's cache says which commit that is, the commit is the model's revision.

    Example:
        >>> import types
        >>> config = types.SimpleNamespace(model_type="llama", num_hidden_layers=2, num_attention_heads=4, head_dim=64)
        >>> identify("/models--org--name/snapshots/12ab", config).name
        'org/name'
    """
    traits = key_traits(config)
    in_hub = HUB.search(os.path.abspath(location))
    if in_hub is not None:
        return ModelIdentity(in_hub["name"].replace("--", "/", 1), in_hub["revision"], None, traits)
    if Path(location).is_dir():
        folder = Path(location).resolve()
        return ModelIdentity(str(folder), "", folder, traits)
    asked = revision or "main"
    return ModelIdentity(str(location), _commit(str(location), asked) or asked, None, traits)


def _commit(name: str, revision: str) -> str | None:
    """The commit of a revision of a model of the hub; None if it is not in the hub's cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no name that the hub can have
        return None
    in_hub = HUB.search(os.path.dirname(found)) if isinstance(found, str) else None
    return None if in_hub is None else in_hub["revision"]


def key_traits(config: Any) -> dict[str, Any]:
    """The parts of a model's configuration on which its keys depend, as plain data.

    Args:
        config: Configuration of the model, by the names of transformers.

    Example:
        >>> import types
        >>> config = types.SimpleNamespace(model_type="llama", num_hidden_layers=2, num_attention_heads=4,
        ...                                num_key_value_heads=2, hidden_size=256, rope_theta=10000)
        >>> key_traits(config)["head_dim"], key_traits(config)["rope"]
        (64, {'rope_theta': 10000.0})
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = text.num_attention_heads
    return {
        "model_type": text.model_type,
        "layers": text.num_hidden_layers,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "rope": _rope(text),
    }


def _rope(config: Any) -> dict[str, Any]:
    """Rotary embedding in one form, for transformers 4 and 5 write it in two."""
    if whole := getattr(config, "rope_parameters", None):
        return _plain(dict(whole))
    apart = {name: getattr(config, name, None) for name in ("rope_theta", "partial_rotary_factor")}
    return _plain(apart | dict(getattr(config, "rope_scaling", None) or {}))


def _plain(rope: dict[str, Any]) -> dict[str, Any]:
    """Numbers as floats; without what is not set or says the default; one name for the kind of scaling."""
    found: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            found[name] = _plain(value)
        elif name in ("type", "rope_type"):
            found |= {} if value == "default" else {"rope_type": value}
        elif value is not None and (name, value) != ("partial_rotary_factor", 1.0):
            found[name] = float(value) if isinstance(value, int | float) else json.loads(json.dumps(value))
    return dict(sorted(found.items()))


def find_statistics(model: ModelIdentity, given: str | Path | None = None) -> Path | None:
    """Finds the file of key statistics of a model.

    Args:
        model: The model.
        given: A file that an option names. It comes first, then `model.places`.

    Returns:
        The file; None if there is none.

    Raises:
        FileNotFoundError: If the file that an option names does not exist.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"expected a file of key statistics, got {given}: make one with `{model.command}`")
        return Path(given)
    return next((place for place in model.places if place.is_file()), None)


def read_statistics(path: str | Path, model: ModelIdentity) -> tuple[np.ndarray, np.ndarray]:
    """Reads the key statistics of a model; needs the `safetensors` package.

    Args:
        path: A file that `tq_jax.save_statistics` wrote.
        model: The model. A file that does not say of which model it is needs to have the model's shape only.

    Returns:
        Mean and weight, float32 [layers, h_kv, d].

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, holds no statistics, or is of another model.
    """
    mean, weight = load_statistics(path)
    wanted, said = model.traits, read_header(path).get("model")
    if said is not None and said != wanted:
        names = sorted(name for name in said.keys() | wanted.keys() if said.get(name) != wanted.get(name))
        expected, got = ({name: traits.get(name) for name in names} for traits in (wanted, said))
        raise ValueError(f"{path}: expected statistics of a model with {expected}, got {got}: run `{model.command}`")
    shape = tuple(wanted[name] for name in ("layers", "kv_heads", "head_dim"))
    if mean.shape != shape:
        raise ValueError(f"{path}: expected statistics [layers, h_kv, d] of {shape}, got {mean.shape}")
    return mean, weight


def missing_statistics(model: ModelIdentity) -> str:
    """Says that a model has no key statistics, what that costs, and which command makes them.

    The cost is that of SmolLM2-135M, the mean of three texts in benchmarks/results/calibrated_cpu.json.
    """
    cost = "; ".join(
        ("without a window " if window == 0 else f"with a window of {window} tokens ")
        + ", ".join(f"{label} {without:g} nats instead of {with_:g}" for label, (without, with_) in figures.items())
        for window, figures in RECORDED.items()
    )
    looked = " or ".join(map(str, model.places))
    return (
        f"no key statistics of {model.name} were found at {looked}, so text diverges further from full precision "
        f"(SmolLM2-135M: {cost}). Make them once, in minutes: {model.command}"
    )
