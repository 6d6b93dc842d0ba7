"""Train and compare strategies: data, models, runs, reports, and the command line."""
