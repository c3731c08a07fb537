"""Bits for each layer: searched or learned under a budget."""
