"""A module's loss, and as a function of its outputs: found, evaluated, differentiated."""
