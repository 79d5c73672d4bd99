"""Quantizers of other projects, as baselines for evaluation."""
