"""Operations of the fast code paths, each in plain torch and, where a GPU has Triton, as one kernel.

``elementwise``, ``float16`` and ``eight_bit`` are what others call: they choose between plain torch and the kernels of
``triton_elementwise``, ``triton_float16``, ``triton_eight_bit`` and ``triton_int8``, which are imported only where
Triton works. ``triton_nf4`` reads NF4 for all of them; ``triton_nf4_rows`` and ``triton_decode`` are the prompt
enhancer's decode step. Imports from ``repository`` (the NF4 format) and ``upstream`` and no other room.
"""
