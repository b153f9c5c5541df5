"""The torch-free runtime: opens a bundle and makes pictures with it."""
