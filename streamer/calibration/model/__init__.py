"""The aligned model without its weights: filled, run and emptied layer by layer, expert by expert."""
