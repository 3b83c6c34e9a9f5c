"""Transports: byte streams that a connection can run over."""
