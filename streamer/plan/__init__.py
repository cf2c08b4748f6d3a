"""What jobs will read, compute and write, checked before any data is read."""
