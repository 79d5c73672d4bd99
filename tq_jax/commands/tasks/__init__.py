"""`tq-jax eval --task`: questions that a model answers to the end from a cache, graded by their own rules."""
