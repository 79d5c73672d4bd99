"""The small operations of a decoder layer around its products, one launch each.

They are the residual norm, and the heads with rotary positions. A decoding step has hundreds of them, so that launches,
not bytes, are their cost.
"""

from pallas_kernels.layer.heads import Heads, JointHeads, split_heads
from pallas_kernels.layer.norm import NormWeights, residual_norm

__all__ = ["Heads", "JointHeads", "NormWeights", "residual_norm", "split_heads"]
