"""What is made of a bundle for one kind of machine: its format on disk, and whether it fits this machine."""
