<<<<<<< HEAD
"""Methods of the section mixed precision: which layer gets how many bits."""
=======
"""Methods that choose the bits of each layer."""
>>>>>>> h-bsq
