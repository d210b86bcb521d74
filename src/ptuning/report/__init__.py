"""The files of an experiment, and the report that is made from them: an HTML page, the same in Markdown, and pictures.

``results_file`` and ``cell_files`` are the schemas of ``results.json`` and of a cell's files, which experiments write
with them. The report reads files only: it must not import the rooms that ran the experiment, and it computes no scores.
A new section is a function listed in ``sections.SECTIONS``, a new column of the main table one in ``tables.COLUMNS``.

Read first: ``results_file``, ``sections``, ``tables``, then ``write``.
"""
