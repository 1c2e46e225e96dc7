"""The codec: compresses images into one file that can be truncated."""
