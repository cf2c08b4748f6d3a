"""What users ask for: the jobs file and its YAML."""
