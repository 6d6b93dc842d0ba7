"""``python -m fxlocal``, as torchrun starts it too: ``torchrun -m fxlocal train ...``."""

from .experiments.cli.app import app

if __name__ == "__main__":
    app()
