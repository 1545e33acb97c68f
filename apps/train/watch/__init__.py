"""A user's view of a training: progress, logs and warnings."""
