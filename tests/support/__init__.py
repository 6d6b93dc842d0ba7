"""What the tests share: nets, laws, oracles, random nets, the command line."""
