"""Measurements and the models they run on."""
