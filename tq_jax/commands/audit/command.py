"""`tq-jax audit`: claims commonly made for KV-cache quantization, measured against their wording.

A claim in quotes is somebody's, the verdict is ours; a line holds when our statement of the fact was measured again.
"""

from tq_jax.commands.audit import memory, quality
from tq_jax.commands.claims import conclude
from tq_jax.commands.output import JsonTarget

CHECKS = (*memory.CHECKS, *quality.CHECKS)


def audit(json: JsonTarget = None) -> None:
    """Measure what is commonly claimed for KV-cache quantization, and say what is misleading.

    Compression ratios with every array counted, needles that queries do not copy, recall, values, unbiasedness, scales,
    shared means, speed. Exits 0 only if every verdict was measured again.

    Args:
        json: Where to write the figures.
    """
    conclude("Claims commonly made for KV-cache quantization", CHECKS, json)
