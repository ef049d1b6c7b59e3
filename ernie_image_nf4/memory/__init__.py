"""Where the weights of a pipeline are: on the device, in host memory, or on their way.

- ``placement.py`` decides the device, the dtype and the memory mode, by what ``requirements.py`` says that each mode
  takes; ``apply.py`` carries the decision out.
- ``offload.py`` keeps components, or blocks of the transformer, in host memory until they are called,
  ``tensor_arena.py`` holds their tensors in a few blocks, and ``pinned_memory.py`` page-locks the blocks.
- ``host_embeddings.py`` leaves on the host what the text encoder doesn't need on the device, and ``vae_tiling.py``
  keeps decoding within the memory that is free.
- ``decode_check.py`` looks for numbers that aren't finite where the VAE decodes.

Imports from ``fast``, ``repository``, ``upstream`` and ``errors``.
"""
