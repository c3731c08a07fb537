"""Methods of the section mixed precision: which layer gets how many bits."""
