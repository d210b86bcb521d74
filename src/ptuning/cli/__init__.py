"""What commands share: options, reading inputs, printing, signals. It must not compute: the rooms below do the work.

Read first: ``app``, ``options``, ``inputs``, ``terminal``, then a command of the room below.
"""
