"""Conversations in data files: the forms that people have them in, and the records that are made of them. It must not
know a chat template: what a model reads is made of the records later.

Read first: ``shapes``, ``conversations``.
"""
