"""The parts of `train.py`: corpus, batches, model, optimizer, schedule, checkpoints, metrics.

Nothing here is imported by `import h_net_dynamic_chunking`; the extra `[train]` brings what these
files need beside torch.
"""
