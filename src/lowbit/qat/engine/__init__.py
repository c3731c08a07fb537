"""The trainer: steps, checkpoints, processes, learning curves."""
