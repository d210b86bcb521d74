"""``python -m ptuning``."""

from ptuning.cli import main

main()
