"""Reports of runs and sweeps: `summary` computes the numbers, the other modules show them."""
