"""`tq-jax bench`: time of operations on the device at hand."""
