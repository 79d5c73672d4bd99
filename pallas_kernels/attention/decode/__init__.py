"""Attention of a few query tokens over packed pages: one pass of programs over tiles of tokens."""
