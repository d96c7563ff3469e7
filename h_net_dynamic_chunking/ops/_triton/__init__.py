"""Triton kernels of the operations, the only files that may import triton; none yet."""
