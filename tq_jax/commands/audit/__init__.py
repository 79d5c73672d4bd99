"""`tq-jax audit`: common headlines about KV-cache compression, measured."""
