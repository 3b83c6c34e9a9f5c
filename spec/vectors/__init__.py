"""The conformance vectors, as data; spec/conformance.md describes them."""
