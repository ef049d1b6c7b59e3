"""Operations of the fast code paths, each in plain torch and, where a GPU has Triton, as one kernel.

``elementwise``, ``float16`` and ``fp8`` are what others call: they choose between plain torch and the kernels of
``triton_elementwise``, ``triton_float16`` and ``triton_fp8``, which are imported only where Triton works. Imports from
``repository`` (the NF4 format) and no other room.
"""
