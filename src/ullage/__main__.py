"""``python -m ullage`` is the command ``ullage``."""

from ullage.cli import main

main()
