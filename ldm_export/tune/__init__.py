"""What is made for one model on one machine: plans fitted to its trajectories, and a search for the best within a budget."""
