"""What patches, imitates or reaches into private parts of torch, diffusers, transformers, accelerate and bitsandbytes.

Each function says what it reaches for, what that gains, the versions in which it was seen, and what happens when the
name is gone: upstream's own way and one line at INFO, never an error while drawing. May import: the libraries, and
nothing of this package.
"""
