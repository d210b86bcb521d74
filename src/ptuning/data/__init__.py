"""From files to questions.

Reading JSONL, CSV and Parquet, shipped facts, task files, LAMA's layouts, word lists, and seeded splits. It must not
know a model or a training.

Read first: ``reading``, ``splits``, ``task_files``, ``questions``, ``relations``.
"""
