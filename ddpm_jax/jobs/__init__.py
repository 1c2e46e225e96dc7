"""The jobs: `--mode=NAME` runs the file of that name."""
