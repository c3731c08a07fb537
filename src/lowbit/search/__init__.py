"""Search for bits under budgets: the problem, exact selection, agents."""
