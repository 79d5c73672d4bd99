"""Specs of small indexes."""

from tq_jax import search as nearest

DIM = 48
PUBLISHED = dict(basis="random", scale="norm", step_search=False, center=False)


def spec(**options):
    return nearest.IndexSpec(**({"dim": DIM, "bits": 4} | options))
