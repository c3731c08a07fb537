"""Networks that run at several bit-widths."""
