"""Scores of texts against ground truth: label sets, ROUGE-L, sentence similarity, percentile ranks."""

from lm_eval_softverb.metrics.labels import first_part, label_scores, phrase_scores

__all__ = ["first_part", "label_scores", "phrase_scores"]
