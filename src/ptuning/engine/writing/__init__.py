"""Answers that a model writes: token by token, by beam search, by sampling, or as filled masks.

It must not know prompts as files or how answers are judged: rows come as templates, records and slot vectors.
Read first: ``generate``, ``writer``, ``continuation``, ``ending``.
"""
