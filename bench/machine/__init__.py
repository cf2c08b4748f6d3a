"""What this machine can do at most, and what others do on it."""
