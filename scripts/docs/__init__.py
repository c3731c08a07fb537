"""Writes the pages of the documentation that come from running code, and builds the site: ``python -m scripts.docs``."""
