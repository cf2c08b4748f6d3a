"""What a job reads: checkpoints, adapters and their files, opened by their headers."""
