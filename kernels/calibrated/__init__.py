"""What is made of Gram matrices: their sums and factors, closed forms, leaks, subspaces."""
