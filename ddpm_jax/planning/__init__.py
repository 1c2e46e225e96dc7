"""Costs of a program: measured here, or computed for other devices."""
