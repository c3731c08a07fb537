"""Comparisons on equal terms: cells and their store, where they run, what must be equal, and the statistics over seeds."""
