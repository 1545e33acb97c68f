"""Class-conditional diffusion transformers with experts, which draw images of a class."""
