"""Comparing runs: statistics over documents and the pages that show them."""
