"""Sharing work: parts of one command, and several workers, each with a backbone of its own.

What one worker does alone is a job: a cell, or prompts that train together. Jobs follow from the work alone, so that
the number of workers changes no result. It must not know what a job computes, comparisons or fleets, and must not
print.

Read first: ``jobs``, ``pool``.
"""
