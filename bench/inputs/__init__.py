"""Synthetic inputs of real shapes, and the kinds of input that people have."""
