"""Plans that are fitted to a model's own trajectories, and a search for the best within a budget of quality."""
