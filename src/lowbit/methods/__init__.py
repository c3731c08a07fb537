"""One file per method, one folder per section of the reading list."""
