"""Hosts of the library transformers; a file for classes that work alike."""
