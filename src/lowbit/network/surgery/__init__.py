"""Changes of the network itself: folding, equalization, shortcuts."""
