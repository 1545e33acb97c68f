"""The smallest complete model: a linear classifier of 8x8 images, whose pixels may pass a mixture of experts first."""
