"""One module a fuzz target: ``run(data)`` raises for a bug, and returns for input that is handled as documented."""
