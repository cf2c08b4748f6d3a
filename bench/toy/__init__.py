"""A toy alignment experiment: small models trained on the spot, defended by the real commands, and judged."""
