"""In other people's loops and compilers: one file for each."""
