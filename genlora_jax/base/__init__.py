"""The frozen base: how its kernels are stored, and how they are read."""
