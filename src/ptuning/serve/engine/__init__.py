"""Answers the rows of many requests on one model: one thread, no waiting, rows of any prompts in one pass.

It must not know HTTP, the names of prompts or their files.
Read first: ``job``, ``engine``, ``scoring``, ``writing``.
"""
