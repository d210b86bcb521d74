"""Experiments of the docs that are not part of the package, each with one command: `python -m experiments.NAME`."""
