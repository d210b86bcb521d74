"""The commands: options, reading inputs, printing. It must not compute: functions of the rooms below do the work.

Read first: ``app``, ``options``, ``inputs``, ``terminal``, then a command such as ``demo``.
"""
