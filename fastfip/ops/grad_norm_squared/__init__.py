"""Op `grad_norm_squared`: its contract, its derivatives, and a file for each backend."""
