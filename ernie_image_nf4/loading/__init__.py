"""A repository becomes a pipeline.

`pipeline.load` decides and places, `build` puts components together, `assembly` makes a model, `tokenizers` a
tokenizer.

May import: memory, fast, repository, upstream.
"""
