"""The public verbs, one file each: the same for Python and the command line."""
