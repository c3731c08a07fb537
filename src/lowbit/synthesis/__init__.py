"""Samples made from a trained network where there are no data: statistics of its norms, and descent on inputs."""
