"""Methods that choose the bits of each layer."""
