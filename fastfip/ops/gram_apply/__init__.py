"""Op `gram_apply`: its contract, its derivatives, and a file for each backend."""
