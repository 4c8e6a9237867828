"""Cosine similarity of every pixel with its neighbours."""
