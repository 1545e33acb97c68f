"""What a user sees of a training: progress, logs and warnings."""
