"""Plans that are made for one model, by what its network gives."""
