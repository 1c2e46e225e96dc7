"""A user's package, which has the name of ours."""
