"""The Triton encode kernel, interpreted, against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.encode_cases import CASES, Case, compare, make_arrays
from pallas_kernels.encode import TileConfig, encode_pages


def run(arrays, implementation, **options):
    function = jax.jit(lambda k, v, p, s: encode_pages(k, v, p, s, **arrays.options, implementation=implementation, **options))
    return function(arrays.keys, arrays.values, arrays.pages, arrays.slots)


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_reference(name):
    arrays = make_arrays(CASES[name])
    found = compare(arrays, run(arrays, "triton"), run(arrays, "reference"))
    assert not found.wrong
    assert found.ties <= max(2, 1e-4 * found.values)
    assert found.scales <= 2
    assert found.searched <= 1
