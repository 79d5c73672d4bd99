"""Attention of many query tokens over packed pages."""
