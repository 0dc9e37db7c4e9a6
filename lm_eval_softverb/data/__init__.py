"""Rows that prompts are trained on and scored with."""
