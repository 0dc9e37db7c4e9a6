"""Turning soft prompts into text. One file per method; :mod:`lm_eval_softverb.verbalizers.base` says what a method is."""
