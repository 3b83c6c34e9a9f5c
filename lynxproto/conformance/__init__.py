"""Conformance: the vectors of spec/vectors, run against this implementation or any other. spec/conformance.md."""
