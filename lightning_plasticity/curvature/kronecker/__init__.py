"""The GGN as a Kronecker product for each layer."""
