"""Triton kernels for Nvidia GPUs; imported only when asked for."""
