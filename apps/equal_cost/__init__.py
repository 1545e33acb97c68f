"""Models of equal cost: solved widths, dense twins, and routers by name."""
