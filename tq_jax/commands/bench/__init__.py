"""`tq-jax bench`: time of operations on this machine's device."""
