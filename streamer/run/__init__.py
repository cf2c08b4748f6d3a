"""One pass over the checkpoints that serves every module of every job."""
