"""The dataflow of a network and what follows from it: channels, moments, blocks."""
