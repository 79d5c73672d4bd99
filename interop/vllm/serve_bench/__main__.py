"""`python -m interop.vllm.serve_bench` is `tq-jax serve-bench`, for a copy of the package that is not installed."""

import typer

from interop.vllm.serve_bench.command import serve_bench

typer.run(serve_bench)
