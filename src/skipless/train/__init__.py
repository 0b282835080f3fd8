"""Train a skipless model from the standard library's own source."""
