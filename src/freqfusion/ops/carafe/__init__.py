"""Content-aware reassembly of features (CARAFE)."""
