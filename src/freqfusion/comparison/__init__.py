"""Runs compared: the race of all fusion methods and the quickstart, with their tables and pages."""
