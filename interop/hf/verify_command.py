"""`tq-jax verify`: whether a Hugging Face model directory works with a compressed cache, in one command.

Importing this module needs neither torch nor transformers, so that `tq-jax` can list the command without them.
"""

from pathlib import Path
from typing import Annotated

import typer

from tq_jax.commands.claims import conclude
from tq_jax.commands.inputs import read_text
from tq_jax.commands.options import JsonTarget, TextFile, parse_bits, refusing
from tq_jax.commands.output import environment
from tq_jax.data import persuasion


def verify(
    model: Annotated[Path, typer.Argument(help="Directory of a Hugging Face model.", exists=True, file_okay=False)],
    prompt: Annotated[str | None, typer.Option(help="What to continue; by default, the text.")] = None,
    text: TextFile = None,
    bits: Annotated[str, typer.Option(help="Key/value bits of the compressed cache.")] = "4/4",
    context: Annotated[int, typer.Option(help="Tokens of the text before the predictions compared.", min=1)] = 512,
    positions: Annotated[int, typer.Option(help="Number of predictions compared.", min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 32,
    max_kl: Annotated[float, typer.Option(help="Largest mean KL, in nats, that the bits may cost.", min=0)] = 0.1,
    dense: Annotated[
        bool, typer.Option("--dense", help="Decompress for the model's own attention: saves storage only.")
    ] = False,
    device: Annotated[str, typer.Option(help="Device on which torch runs the model.")] = "cpu",
    json: JsonTarget = None,
) -> None:
    """Say whether a Hugging Face model works with a compressed cache: layers, greedy tokens, KL, bytes.

    Names the layers that are compressed, and why the others are not. Runs the model with DynamicCache and its own
    attention, then with TurboQuantCache. Exits 0 only if some layer is compressed, the greedy tokens with 8-bit keys
    and values are those of DynamicCache after a prompt of which tokens are read from their codes, the next token
    diverges by no more than --max-kl at the chosen bits, and the compressed cache is smaller.
    """
    widths = parse_bits(bits)
    if len(widths) != 1:
        raise typer.BadParameter(f"expected one pair of bits like 4/4, got {bits!r}")
    content = read_text(text) if text else persuasion()
    with refusing("torch,hf"):
        from interop.hf import measure
        from interop.hf.verify import Verification
    job = measure.load_task(
        model, content, prompt,
        context=context, positions=positions, new_tokens=new_tokens, device=device, graphs=False, dense=dense,
    )  # fmt: skip
    found = Verification(job, widths[0], most_kl=max_kl)
    found.payload |= {"model": str(model), "dense": dense, "attention": job.attention, "environment": environment()}
    conclude(f"{model} with TurboQuantCache", found.checks, json, payload=found.payload)
