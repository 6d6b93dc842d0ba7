"""How a run trains, and what it notes."""
