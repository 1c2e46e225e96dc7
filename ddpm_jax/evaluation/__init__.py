"""Measurements of a run: the bound, and scores of samples."""
