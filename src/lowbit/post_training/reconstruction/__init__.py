"""Parts of a network made to give the float network's outputs, one after the other."""
