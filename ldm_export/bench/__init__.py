"""Measures a bundle: the same pictures as PyTorch, and how fast."""
