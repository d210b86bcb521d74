"""The commands, one file a command or a few that belong together: options, the call, the text that is printed.

A command must not know another one; what two of them share is in ``ptuning.cli``.
Read first: ``demo``, ``prompts``, ``train``, ``experiments``.
"""
