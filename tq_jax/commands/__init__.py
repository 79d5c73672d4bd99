"""The `tq-jax` command line: one folder per command, and shared modules beside them."""
