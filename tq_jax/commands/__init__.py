"""The `tq-jax` command line: every command in a folder of its own, what they share beside them."""
