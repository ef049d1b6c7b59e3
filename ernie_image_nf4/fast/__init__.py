"""Faster forward passes for the models of a pipeline, as subclasses of upstream's classes.

``transformer`` and ``prompt_enhancer`` have the classes, and the functions by which an upstream model becomes one of
them. Whatever a fast class doesn't serve (gradients, torch.compile, unknown options) goes to its base. What a model
keeps beside its weights (CUDA graphs, streams, caches) is its ``runtime``, which copies and pickles leave behind.

Imports from ``repository``, ``upstream`` and ``errors``. Knows no memory modes, pipelines or command lines.
"""
