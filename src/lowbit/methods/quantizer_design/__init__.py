"""Methods that design the quantizer: which levels, and where values go."""
