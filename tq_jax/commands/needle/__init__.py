"""`tq-jax needle`: numbers found in long texts."""
