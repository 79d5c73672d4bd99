"""`tq-jax audit`: usual headlines about KV-cache compression, measured."""
