"""The study: which method learns most for its parameters."""
