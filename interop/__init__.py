"""Bridges of tq-jax to other frameworks: torch, transformers and vLLM over the same compressed bytes."""
