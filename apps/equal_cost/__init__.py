"""Models of equal cost: dense twins, and routers by name."""
