"""Exporters from PyTorch to what a bundle holds."""
