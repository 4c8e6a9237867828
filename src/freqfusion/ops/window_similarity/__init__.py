"""Inner products of each fine pixel with the coarse pixels of a window."""
