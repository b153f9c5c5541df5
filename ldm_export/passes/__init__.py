"""Techniques that change a model in PyTorch: a checkpoint in, the networks that differ out. One technique a file."""
