"""Sweeps: many adapters trained at once over one base."""
