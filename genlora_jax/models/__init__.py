"""Linen models; they know nothing of adapters."""
