"""Where the weights of a pipeline are, and when."""
