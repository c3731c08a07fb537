"""Binary networks: weights, or weights and inputs, of one bit."""
