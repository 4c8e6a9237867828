"""What fusion does to features: similarity, spectra, and a page with an explorer of single pixels."""
