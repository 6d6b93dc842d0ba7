"""A prefix computed once: what crosses its boundary is kept, sample by sample."""
