"""From `results.json` to HTML, Markdown and pictures.

It reads files only, and must not import the rooms that wrote them.

Read first: ``results_file``, ``tables``, ``write``.
"""
