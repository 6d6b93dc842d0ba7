"""From networks to steps: compiling, driving epochs, resuming."""
