"""Classes the harness runs: everything here is an ``lm_eval`` model."""
