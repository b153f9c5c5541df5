"""Bundles and checkpoints compared with one another, and pictures judged: above export and runtime, which it uses."""
