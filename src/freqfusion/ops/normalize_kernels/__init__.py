"""Normalisation of predicted kernels."""
