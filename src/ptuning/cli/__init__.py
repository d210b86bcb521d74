"""What commands share: options, reading inputs, printing, signals. It computes nothing itself.

Read first: ``app``, ``options``, ``inputs``, ``terminal``, then a command.
"""
