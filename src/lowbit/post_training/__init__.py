"""What post-training methods are made of: the steps they share, and learned rounding."""
