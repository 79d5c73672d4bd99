"""Tokens of packed pages as the model had them: dense keys and values in the original basis."""

from pallas_kernels.dequantize.api import dequantize_pages
from pallas_kernels.dequantize.arguments import DequantizeArguments, matrix_gain

__all__ = ["DequantizeArguments", "dequantize_pages", "matrix_gain"]
