"""What a user's recipes share."""

STEPS = 2
