"""Evaluation of a run: the variational bound, and scores of samples."""
