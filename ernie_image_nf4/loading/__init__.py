"""A repository becomes a pipeline."""
