"""From PyTorch to what a bundle holds."""
