"""Text in, statistics out: the imatrix, the gradient-weighted imatrix, routing."""
