"""`tq-jax demo`: a small language model answers from compressed caches."""
