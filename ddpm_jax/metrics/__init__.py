"""Measures of sample quality, and the networks that they need."""
