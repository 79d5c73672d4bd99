"""A compressed cache whose memory torch owns: bytes, operations on CPU and GPU, pages of serving engines."""
