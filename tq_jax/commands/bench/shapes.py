"""Named shapes of attention in production, for benchmarks and tests."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """Attention of the last tokens of sequences to all tokens of these sequences.

    Attributes:
        batch: Number of sequences.
        seq: Tokens per sequence.
        q_len: Query tokens per sequence.
        q_heads: Number of query heads.
        kv_heads: Number of KV heads.
        head_dim: Channels of a head.
    """

    batch: int
    seq: int
    q_len: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def as_dict(self) -> dict[str, Any]:
        """The shape as fields of a row."""
        return dataclasses.asdict(self)

    @property
    def label(self) -> str:
        """The shape in a few characters.

        Example:
            >>> Shape(8, 32768, q_len=4).label
            '8 x 32768, 4 queries'
        """
        dim = "" if self.head_dim == 128 else f", dim {self.head_dim}"
        return f"{self.batch} x {self.seq}{dim}" + (f", {self.q_len} queries" if self.q_len > 1 else "")

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products, without causal masks."""
        return 4 * self.batch * self.q_len * self.seq * self.q_heads * self.head_dim

    def nbytes(self, bytes_per_token: int) -> int:
        """Bytes of keys and values that attention must read, from the bytes per token and KV head."""
        return self.batch * self.seq * self.kv_heads * bytes_per_token


DECODE = {
    "batch 8": Shape(8, 32768),
    "batch 32": Shape(32, 8192),
    "long": Shape(1, 131072),
    "single": Shape(1, 32768),
    "dim 64": Shape(8, 32768, head_dim=64),
    "dim 256": Shape(8, 32768, head_dim=256),
    "verify": Shape(8, 32768, q_len=4),
}
"""Llama 3.1 8B at several loads, two other head dims, and four speculative tokens to verify."""

PREFILL = {"chunk": Shape(1, 32768, q_len=256), "chunks": Shape(4, 32768, q_len=256)}
"""One chunk of a long prompt, and chunks of several prompts."""

SMALL = {
    "decode": Shape(2, 512, q_heads=8, kv_heads=2),
    "prefill": Shape(1, 256, q_len=32, q_heads=8, kv_heads=2),
}
"""Shapes that a CPU can run."""
