"""What an alignment test multiplies with: V = aligned - unaligned in tiles, of plain weights and of quantised ones."""
