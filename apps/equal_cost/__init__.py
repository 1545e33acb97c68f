"""Models of equal cost: matched dense baselines, and routers by name."""
