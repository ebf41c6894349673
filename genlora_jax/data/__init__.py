"""Data: rows, their encoding as tokens, and packing into batches."""
