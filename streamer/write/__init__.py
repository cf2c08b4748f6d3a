"""Outputs that are there whole or not at all, and the journal from which an interrupted one goes on."""
