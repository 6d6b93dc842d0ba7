"""From a Plan and a model to a rewritten `Network`."""
