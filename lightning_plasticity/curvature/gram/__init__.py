"""GGN and NTK through the Gram matrix of per-sample gradient rows: exact, estimated, layer by layer."""
