"""Trained networks of freqfusion, one folder each; ``freqfusion.load_released(NAME)`` reads them."""
