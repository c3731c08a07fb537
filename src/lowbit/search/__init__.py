"""Searching for bits: which choice each layer gets under one or several budgets."""
