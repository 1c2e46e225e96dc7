"""Networks, and their layers."""
