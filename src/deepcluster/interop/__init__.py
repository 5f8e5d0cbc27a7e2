"""Other programs' formats, each in a file of its own: models read and written, downloads, and `load`, which opens any."""
