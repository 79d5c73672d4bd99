"""`tq-jax validate`: the theorems of the paper."""
