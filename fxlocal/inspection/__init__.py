"""What was done to a model: explanations, verification, tables."""
