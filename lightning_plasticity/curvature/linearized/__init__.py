"""What gradient descent would do to the linearised network."""
