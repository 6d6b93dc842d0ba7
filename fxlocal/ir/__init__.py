"""Graphs: what they are, how they are edited, run on fake tensors and printed."""
