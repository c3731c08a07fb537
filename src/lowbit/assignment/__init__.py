"""Which layer gets how many bits: budgets and costs, the problem that a search method gets, exact selection, agents."""
