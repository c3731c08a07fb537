"""Methods for networks that run in integers alone."""
