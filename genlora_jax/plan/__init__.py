"""Planning: what a recipe would need on devices that the user need not have."""
