"""Tuners make a prompt from rows of (input, output)."""
