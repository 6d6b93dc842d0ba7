"""From a model to a `Network`: capture, and what it must guard against."""
