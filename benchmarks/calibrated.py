"""What key statistics are worth that are in a file: divergence without any, with a file's, and with the prompt's own.

python benchmarks/calibrated.py MODEL_DIR --json calibrated.json
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax.numpy as jnp
import typer

import tq_jax as tq
from tq_jax.commands.divergence import Reference, fill_cache, make_reference, measure, tq_scheme
from tq_jax.commands.eval.schemes import SINKS, Packed
from tq_jax.commands.eval.texts import load_texts
from tq_jax.commands.inputs import first_tokens, keep_compiled, open_model
from tq_jax.commands.options import JsonTarget, parse_bits, parse_numbers
from tq_jax.commands.output import environment, open_console, write_json, write_partial
from tq_jax.models import Decoder
from tq_jax.statistics_files import FILE_NAME


@dataclasses.dataclass(frozen=True)
class Calibrated(Packed):
    """A cache with statistics that are known before its first token.

    Attributes:
        statistics: Mean and weight of the keys [layers, h_kv, d].
    """

    statistics: tuple[Any, Any] = ()  # pyright: ignore[reportAssignmentType]

    def start(self, decoder: Decoder, reference: Reference) -> tq.Cache:
        """A cache that holds the prefix."""
        given = tuple(jnp.asarray(array) for array in self.statistics)
        cache = tq.init_cache(self.scheme.cache, batch=decoder.config.num_layers, statistics=given)
        return fill_cache(cache, *reference.projections, jnp.int32(reference.prefix))


def main(
    model: Annotated[Path, typer.Argument(help="Directory of a model, with a file by `tq-jax calibrate`.")],
    texts: Annotated[str, typer.Option("--texts", help="Texts, as in `tq-jax eval`.")] = "persuasion,pydoc,wiki",
    bits: Annotated[str, typer.Option("--bits", help="Key/value bits.")] = "4/4,3/3",
    windows: Annotated[str, typer.Option("--windows", help="Latest tokens in full precision.")] = "128,0",
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens before the first prediction.")] = 1024,
    positions: Annotated[int, typer.Option("--positions", help="Predictions per text.")] = 256,
    json: JsonTarget = None,
) -> None:
    """Compare caches without key statistics, with those of a file, and with those of the prompt."""
    keep_compiled()
    loaded, console, rows = open_model(str(model)), open_console(json), []
    file = tq.load_statistics(model / FILE_NAME)
    count = prompt + positions + 1
    payload = {"model": model.name, "prompt": prompt, "positions": positions} | environment()
    for name, content in load_texts(texts.split(",")).items():
        tokens = first_tokens(loaded, name, content, count)
        reference = make_reference(loaded.decoder, tokens, positions=positions)
        for window in parse_numbers(windows, int):
            for key_bits, value_bits in parse_bits(bits):
                scheme = tq_scheme(loaded.decoder, count, key_bits=key_bits, value_bits=value_bits)
                exact = {"window": window, "sink_tokens": SINKS if window else 0}
                ours = dataclasses.replace(scheme, cache=dataclasses.replace(scheme.cache, **exact))
                spec = dataclasses.replace(ours.cache, center_keys=False, smooth_keys=False)
                for kind, candidate in {
                    "none": Packed(dataclasses.replace(ours, cache=spec)),
                    "file": Calibrated(ours, statistics=file),
                    "prompt": Packed(ours),
                }.items():
                    quality = measure(loaded.decoder, reference, candidate)
                    rows.append({"text": name, "window": window, "cache": ours.label, "statistics": kind})
                    rows[-1] |= {"kl_mean": quality.kl_mean, "kl_p999": quality.kl_p999, "top1": quality.top1}
                    console.print(rows[-1], highlight=False)
                    write_partial(payload, rows, json)
    write_json(payload | {"rows": rows, "complete": True}, json)


if __name__ == "__main__":
    typer.run(main)
