"""`tq-jax search`: nearest-neighbour search against other methods."""
