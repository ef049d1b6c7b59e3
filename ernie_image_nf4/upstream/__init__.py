"""What reaches into other libraries."""
