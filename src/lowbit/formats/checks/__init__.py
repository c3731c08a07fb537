"""Checks of exported files: whether they compute what the network computes, and how fast."""
