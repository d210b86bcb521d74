"""The commands, a file for each or for a few that belong together: options, the call, the text that is printed.

A command does not import another one; what two of them share is in ``ptuning.cli``.
"""
