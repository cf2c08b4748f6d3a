"""Ways to have a model answer: in this process, or through inspect_ai."""
