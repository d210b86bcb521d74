"""Conversations in data files: the forms that people have them in, and the records that are made of them.

Start with ``shapes``, the table of forms; ``conversations`` makes records of rows in one of them.
"""
