"""An original repository becomes an NF4 repository."""
