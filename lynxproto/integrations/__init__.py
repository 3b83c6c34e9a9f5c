"""Adapters for inference engines; each is imported by name and needs its engine."""
