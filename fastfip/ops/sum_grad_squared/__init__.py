"""Op `sum_grad_squared`: its contract, its derivatives, and a file for each backend."""
