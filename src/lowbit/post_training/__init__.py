"""The building blocks of post-training methods: shared steps and learned rounding."""
