"""A map normalised in groups of channels, and its local similarity."""
