"""Safe Delta's operations: what of a delta is kept, and how the rest is compensated."""
