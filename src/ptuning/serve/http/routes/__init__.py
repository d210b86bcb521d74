"""What can be asked over HTTP, a module for each family of addresses.

It must not know how rows are run, and nothing of the sockets.
Read first: ``about``, ``predict``, ``completions``, ``chat``, ``classify``, ``tokens``.
"""
