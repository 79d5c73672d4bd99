"""Measurements: the theorems, the audit of claims, and quality on language models."""
