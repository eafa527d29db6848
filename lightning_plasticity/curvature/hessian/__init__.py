"""The Hessian of a loss: products, plans within a budget, spectra and eigenpairs."""
