"""The files of an experiment, and the report that is made from them: an HTML page, the same in Markdown, and pictures.

Experiments write their files with ``results_file``. The report reads files only: it must not import
the rooms that ran the experiment, and it computes no scores.

Read first: ``results_file``, ``sections``, ``tables``, then ``write``.
"""
