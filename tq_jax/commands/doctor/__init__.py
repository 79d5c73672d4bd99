"""`tq-jax doctor`: what this machine can run."""
