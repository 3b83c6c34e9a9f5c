"""Coverage-guided fuzzing; see fuzz/README.md."""
