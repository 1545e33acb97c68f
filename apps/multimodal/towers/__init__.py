"""The networks of images and texts, and their loss."""
