"""Verbs that take the folder of a run of ``fxlocal train``, and what it has learned."""
