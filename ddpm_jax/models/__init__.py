"""Networks. `config.model.name` is a file of this folder with a `build`."""
