"""`calibrate`: Grams and factors of a model, made and saved layer by layer."""
