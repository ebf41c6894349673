"""Decoding, and answers to prompts as text."""
