"""Runs a tiny random model of every family and writes docs/families.md.

python tests/write_families.py                          writes docs/families.md: minutes
python tests/write_families.py -o - --only llama,llava  prints the rows of some families
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers
from family_checks import MOST, MOST_KL, WINDOW, Found, ask_text, ask_vision, check, is_known, make_text, make_vision
from text_families import DENSE_FAMILIES, TEXT_FAMILIES
from vision_families import FAMILIES

TARGET = Path(__file__).parents[1] / "docs" / "families.md"
HEADER = "| family | class in transformers | layers compressed | same tokens, logits differ by | KL at 8 bits, nats |"

TEXT = f"""# Model families in Hugging Face transformers

`python tests/write_families.py` wrote this page: it ran a tiny random model of every family with `DynamicCache` and
the model's own attention, then with `TurboQuantCache`, here with transformers {{transformers}} and torch {{torch}} on a
CPU.

* Same tokens: six greedy tokens are those of `DynamicCache` while all tokens lie in the window of {WINDOW}. The number
  is the largest difference of their logits; up to {MOST:g} passes. A text prompt is two rows, one of which is padded.
* KL at 8 bits: the mean divergence of the tokens behind the first with 8-bit keys and values, no window and no sinks,
  so that every token of the cache is read from its codes. Up to {MOST_KL:g} passes.
* Layers that are not compressed keep a sliding window or a state, attend to an image or share the keys and values of
  another layer; `TurboQuantCache(config).kept_layers` says which and why.

The numbers say that the code is right for a family. What a real model loses depends on its weights: `tq-jax verify`
says it for a model directory. `python -m pytest -m families tests/interop/hf` runs every family as a test, a third of
which run by default.
"""
SECTIONS = {
    "Text": "",
    "Text, with `dense=True`": "Attention of these models does not go through transformers' AttentionInterface: the "
    "cache returns\ntensors and saves storage only.\n",
    "Images": "",
    "Videos": "",
}


def families():
    """Section, family and what makes its model and prompt."""
    for section, names in zip(SECTIONS, (TEXT_FAMILIES, DENSE_FAMILIES), strict=False):
        for name in names:
            yield section, name, name, make_text, lambda _: ask_text()
    for section, kind in (("Images", "image"), ("Videos", "video")):
        for name, family in FAMILIES.items():
            if getattr(family, kind) is not None:
                yield (
                    section,
                    name,
                    family.config["model_type"],
                    make_vision,
                    lambda name, kind=kind: ask_vision(name, kind),
                )


def row(name: str, found: Found) -> str:
    """A row of the table."""
    same = "yes" if found.is_exact else "**no**"
    layers = f"{found.compressed} of {found.layers}"
    return f"| {name} | {found.model} | {layers} | {same}, {found.difference:.0e} | {found.kl:.1e} |"


def main() -> int:
    """Writes the table; 1 if a family fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default=str(TARGET), help="file to write, or - for standard output")
    parser.add_argument("--only", default="", help="families, comma-separated; all by default")
    options = parser.parse_args()
    only, failed = set(filter(None, options.only.split(","))), []
    unknown = only - {name for _, name, *_ in families()}
    if unknown:
        parser.error(f"expected families of tests/text_families.py and tests/vision_families.py, got {sorted(unknown)}")
    rows: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for section, name, model_type, make, ask in families():
        if (only and name not in only) or not is_known(model_type):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = check(make(name), ask(name), dense="dense" in section)
        rows[section].append(row(name, found))
        failed += [] if found.is_exact and found.kl < MOST_KL else [name]
        print(f"{section}: {rows[section][-1]}", file=sys.stderr, flush=True)
    text = TEXT.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
    for section, lines in rows.items():
        table = "\n".join([HEADER, "|---|---|---|---|---|", *lines])
        text += f"\n## {section}\n\n{SECTIONS[section]}\n{table}\n".replace("\n\n\n", "\n\n") if lines else ""
    if options.output == "-":
        print(text)
    else:
        Path(options.output).write_text(text, "utf-8")
    if failed:
        print(f"not as they should be: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
