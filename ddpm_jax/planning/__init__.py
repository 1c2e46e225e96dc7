"""What a program costs, here or on devices that are not here."""
