"""Faster code paths for the models of a pipeline."""
