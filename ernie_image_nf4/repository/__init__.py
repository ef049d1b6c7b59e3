"""A folder or Hub id becomes a repository that was read and checked once.

`resolve` finds the folder, `record` opens it; `components` is the one table of what a repository holds. `security`,
`validation` and `integrity` refuse what is hostile, inconsistent or damaged. May import: upstream.
"""
