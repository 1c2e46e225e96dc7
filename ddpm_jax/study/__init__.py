"""The figures of the paper, and others like them."""
