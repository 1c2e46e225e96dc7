"""Images from disk to batches: sources, and the pipeline that orders them."""
