"""How ranges and scales are chosen from data: observers and searches."""
