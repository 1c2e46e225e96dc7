"""What a user asks for: `--mode=NAME` runs the file of that name."""
