"""Inputs and modules of a finished output, looked at once more."""
