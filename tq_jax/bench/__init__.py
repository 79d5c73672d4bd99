"""What `tq-jax bench` is made of: one module an operation, and the timer, peers, claims and picture that they share.

An operation's module has one function, `jobs(setting) -> Iterator[Job]`. A job measures some rows (plain dicts) and may
fail without harm to the others.
"""
