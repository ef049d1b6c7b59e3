"""A folder or Hub id becomes a repository that is known to be sound."""
