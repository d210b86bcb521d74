"""Comparing methods over tasks and seeds, cell by cell, so that a stopped comparison resumes.

``compare``, LAMA, SuperGLUE and the demo. The schema of ``results.json`` is in ``report``. It must not
print or exit.

Read first: ``comparison``, ``cells``, ``results``, ``compare``.
"""
