"""`tq-jax eval`: divergence per stored bit against rivals."""
