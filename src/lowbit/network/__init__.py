"""Quantizers in a network: insert, traverse, fold, equalize, dataflow."""
