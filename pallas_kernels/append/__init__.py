"""Appending to a whole cache: tokens leave the full-precision window, are encoded, and new tokens enter it.

`whole_cache` has the operation, `slots` the rule of places, which attention follows too; docs/decode_step.md draws the
launches of a step.
"""
