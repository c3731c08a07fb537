"""Training techniques: procedures that any quantizer can go through, with the quantizers of their papers."""
