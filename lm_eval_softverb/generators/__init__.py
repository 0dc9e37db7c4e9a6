"""Data written by language models: chat backends, the classification DoD, paraphrases of task definitions."""
