"""Capture by `torch.export`."""
