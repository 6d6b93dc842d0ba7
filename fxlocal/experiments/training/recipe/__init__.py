"""How a run trains beside its strategy: weights to begin with, augmentation, averages, limits."""
