"""Layers of few bits."""
