"""What a process trains: the whole network, its share of each batch, or a local module."""
