"""Grouped bilinear sampling at displaced positions."""
