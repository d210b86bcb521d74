"""Data that is made by rule when it is asked for: the same rows every time, without files.

Start with ``table``, which names the data sets; each module beside it makes one. A row has the names of the data set
that people know for its shape (ADGEN, Goat), and ``fields`` says which of them is the target.
"""
