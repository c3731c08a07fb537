"""The .lowbit file."""
