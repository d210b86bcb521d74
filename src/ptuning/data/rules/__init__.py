"""Data that is made by rule when it is asked for: the same rows every time, without files.

A row has the names that people know from its shape (ADGEN, Goat, chats), and the table says which is the target. A rule
must not draw from a random generator, whose numbers differ between versions of Python.

Read first: ``table``, which names the data sets; then the module of one, and ``draws``.
"""
