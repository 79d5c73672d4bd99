"""`tq-jax audit`: claims commonly made for KV-cache quantization, measured.

A claim in quotes is commonly made by others; the verdict is this project's. A line holds if its figure keeps the bound
on which the verdict rests.
"""

from tq_jax.commands.audit import memory, quality
from tq_jax.commands.claims import conclude
from tq_jax.commands.options import JsonTarget

CHECKS = (*memory.CHECKS, *quality.CHECKS)


def audit(json: JsonTarget = None) -> None:
    """Measure what is commonly claimed for KV-cache quantization, and say what is misleading.

    Covers compression ratios with every array counted, needles that queries do not copy, recall, values, unbiasedness,
    scales, shared means, and speed. Exits 0 only if the measurements confirm every verdict.
    """
    conclude("Claims commonly made for KV-cache quantization", CHECKS, json)
