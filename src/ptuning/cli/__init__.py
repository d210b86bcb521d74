"""The commands: options, reading inputs, printing. One file a command, with what it prints.

The only room that prints and exits, and the only one that imports typer and rich. It must not compute: the work of a
command is a function of a room below, which Python users call as well.

Read first: ``app``, ``options``, ``inputs``, ``terminal``, then a command such as ``demo``.
"""
