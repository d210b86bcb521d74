"""The commands: options, reading inputs, printing.

The only room that prints and exits, and the only one that imports typer and rich. It must not compute.

Read first: ``app``, ``options``, ``terminal``.
"""
