"""Documents, fields and options, read strictly and within bounds: what every part reads its input with."""
