"""Figures of the paper, and further figures of the same kind."""
