"""The codec: images as one file that can be cut off."""
