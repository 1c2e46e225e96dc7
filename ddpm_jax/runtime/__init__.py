"""The outside world, one part of it a file."""
