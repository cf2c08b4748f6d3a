"""The end of a job: what is said of it, and how its output gets its name."""
