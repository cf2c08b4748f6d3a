"""What operations stand on: random bits, memory that is kept, first calls made ahead."""
