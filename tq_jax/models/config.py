"""The static description of a decoder; `config_hf` and `config_gguf` read it from files."""

from __future__ import annotations

from dataclasses import dataclass

from tq_jax.models.rope import RopeScaling


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Static description of a decoder: hashable, so that it can be part of a compiled function's key.

    Attributes:
        vocab_size: Rows of the token embedding.
        dim: Width of the residual stream.
        num_layers: Number of decoder blocks.
        num_heads: Number of query heads.
        num_kv_heads: Number of KV heads; divides `num_heads`.
        head_dim: Channels of one head; even.
        ffn_dim: Width of the feed-forward block.
        rope_base: Base of the rotary frequencies.
        rope_scaling: How the rotary frequencies are stretched for long contexts; None if they are not.
        rotary_dim: Channels of a head that turn with its position, even; None for all; see `rope.partial_order`.
        no_rope_layers: Whether each layer leaves positions out, one flag per layer; empty if none does.
        query_scalar: Attention scores are divided by its square root; None means `head_dim`.
        attention_softcap: Attention scores x become softcap * tanh(x / softcap); None if they are left as they are.
        final_softcap: Logits of the next token are bounded in the same way; None if they are not.
        sliding_window: Tokens that a query of a local layer sees, itself included; None if no layer is local.
        local_layers: Whether each layer is local, one flag per layer; empty if all layers are alike.
        local_rope_base: Base of the rotary frequencies of local layers, which are never stretched; None if local layers
            use the frequencies of the others.
        num_experts: Experts of each feed-forward block, of width `ffn_dim` each; 0 if blocks have none.
        experts_per_token: Experts that each token takes.
        normalized_experts: Whether the weights of a token's experts sum to one; if not, those of all experts do.
        norm_eps: Epsilon of every RMS norm.
        tied_head: Whether the output head is the transposed token embedding.
        max_context: Tokens that the model was trained to attend over. It also chooses between the divisors of
            "longrope", see `rope.RopeScaling.for_context`.
        stop_tokens: Token ids that end a generation.
        architecture: Name of the family, one of `families.FAMILIES`; it decides which parts a layer has.

    Raises:
        ValueError: If a size is not positive, or if the sizes contradict each other.

    Example:
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48, sliding_window=16, local_layers=(True, False))
        >>> config.rope_base, config.layer_windows
        (10000.0, (16, None))
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    no_rope_layers: tuple[bool, ...] = ()
    query_scalar: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope_base: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    normalized_experts: bool = True
    norm_eps: float = 1e-5
    tied_head: bool = False
    max_context: int = 2048
    stop_tokens: tuple[int, ...] = ()
    architecture: str = "llama"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "max_context")
        optional = (
            "query_scalar",
            "sliding_window",
            "local_rope_base",
            "rotary_dim",
            "attention_softcap",
            "final_softcap",
        )
        given = [name for name in optional if getattr(self, name) is not None]
        for name in (*sizes, "rope_base", "norm_eps", *given):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {self.head_dim}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(
                f"rotary_dim: expected an even number up to head_dim={self.head_dim}, got {self.rotary_dim}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token: expected 1 to num_experts={self.num_experts}, got {self.experts_per_token}"
            )
        for token in self.stop_tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"stop_tokens: expected ids in [0, {self.vocab_size}), got {token}")
        self._unify_layers()

    def _unify_layers(self) -> None:
        """Give equal fields to decoders that compute the same: if all layers are alike, the list of layers is empty."""
        for name in ("local_layers", "no_rope_layers"):
            flags = getattr(self, name)
            if flags and len(flags) != self.num_layers:
                raise ValueError(f"{name}: expected {self.num_layers} flags, one per layer, got {len(flags)}")
        if not any(self.no_rope_layers):
            object.__setattr__(self, "no_rope_layers", ())
        if self.rotary_dim == self.head_dim:
            object.__setattr__(self, "rotary_dim", None)
        if any(self.local_layers) and self.sliding_window is None:
            raise ValueError("sliding_window: expected a number of tokens for the local layers, got None")
        if self.local_layers and not any(self.local_layers):
            object.__setattr__(self, "sliding_window", None)
        if len(set(self.local_layers)) == 1:
            object.__setattr__(self, "local_layers", ())
        if self.sliding_window is None or (self.local_rope_base == self.rope_base and self.rope_scaling is None):
            object.__setattr__(self, "local_rope_base", None)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Tokens that a query sees, one entry per layer; None if it sees all."""
        local = self.local_layers or (self.sliding_window is not None,) * self.num_layers
        return tuple(self.sliding_window if is_local else None for is_local in local)

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores."""
        return float(self.query_scalar or self.head_dim) ** -0.5

    @property
    def layer_positions(self) -> tuple[bool, ...]:
        """Whether each layer has rotary positions."""
        return tuple(not left_out for left_out in self.no_rope_layers) or (True,) * self.num_layers

    def rope(self, window: int | None) -> tuple[float, RopeScaling | None]:
        """Rotary frequencies of a layer that has rotary positions.

        Args:
            window: Sliding window of the layer, see `layer_windows`.

        Returns:
            Base and scaling of the frequencies.
        """
        if window is not None and self.local_rope_base is not None:
            return self.local_rope_base, None
        scaling = self.rope_scaling
        return self.rope_base, None if scaling is None else scaling.for_context(self.max_context)


@dataclass(frozen=True)
class Run:
    """Consecutive layers that are alike.

    Attributes:
        window: Sliding window of the layers, see `DecoderConfig.layer_windows`.
        rotary: Whether they have rotary positions.
        first: Number of the first of them.
        count: How many they are.
    """

    window: int | None
    rotary: bool
    first: int
    count: int


def runs_of(config: DecoderConfig, *, unroll: bool) -> tuple[Run, ...]:
    """The layers of a decoder as runs.

    Args:
        config: The decoder.
        unroll: Whether every layer is a run of its own, and not every longest run of like layers.

    Example:
        >>> config = DecoderConfig(vocab_size=64, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
        ...                        ffn_dim=48, sliding_window=16, local_layers=(True, True, False))
        >>> [run.count for run in runs_of(config, unroll=False)], len(runs_of(config, unroll=True))
        ([2, 1], 3)
    """
    kinds = list(zip(config.layer_windows, config.layer_positions, strict=True))
    starts = [i for i in range(len(kinds)) if unroll or i == 0 or kinds[i] != kinds[i - 1]]
    ends = [*starts[1:], len(kinds)]
    return tuple(Run(*kinds[first], first, end - first) for first, end in zip(starts, ends, strict=True))
