"""A package of the name of ours, in the folder where a user works."""
