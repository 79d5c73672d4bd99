"""`tq-jax inspect`: what a file holds."""
