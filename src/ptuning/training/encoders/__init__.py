"""What computes slot vectors while they are learned, for one prompt and for many at once. It must not know how training
goes on from step to step.
Read first: ``encoder``, ``together``.
"""
