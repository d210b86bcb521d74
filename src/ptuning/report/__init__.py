"""The files of an experiment, and the report that is made from them: an HTML page, the same in Markdown, and pictures.

``results_file`` and ``cell_files`` are the schemas of ``results.json`` and of a cell's files. The experiments write
them, and the report reads them. The report computes no scores.

Read in this order: ``results_file``, ``cell_files``, ``blocks``, ``tables``, ``pictures``, ``limits``, ``sections``,
``write``. A new section is a function listed in ``sections.SECTIONS``, a new column of the main table one listed in
``tables.COLUMNS``.
"""
