"""Dynamic chunking for sequence models: the H-Net (arXiv 2507.07955), as parts that compose."""
