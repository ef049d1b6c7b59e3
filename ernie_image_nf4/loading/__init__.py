"""A repository becomes a pipeline.

`pipeline.load` decides and places, `build` puts components together, `assembly` a model.

May import: memory, fast, repository, upstream.
"""
