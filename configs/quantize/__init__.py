"""Few bits and sparsity learned with the network."""
