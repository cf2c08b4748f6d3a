"""What several methods share beside the base: calibration, a leak for a strength, a recipe, writing for who serves."""
