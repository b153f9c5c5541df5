"""What one model on one machine is drawn with: a search within a budget of quality, and plans made for that model."""
