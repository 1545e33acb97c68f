"""What happens in a training step: the module, its losses, and what is measured."""
