"""The pieces that the scripts in train/ wire together."""
