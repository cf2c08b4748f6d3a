"""What headers show to be wrong with a request, or to be unlike what was meant."""
