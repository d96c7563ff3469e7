"""Triton kernels, the only files that may import triton, and imported where they run only.

Decoding, one position of each row: the files `*_step`. They know no autograd, read nothing on the
host and allocate by shape alone, so that a step of a whole model can be captured as a CUDA graph.
"""
