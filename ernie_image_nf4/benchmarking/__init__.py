"""Speed and memory, measured and reported."""
