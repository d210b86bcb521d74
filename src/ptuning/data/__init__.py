"""Data: from files to questions.

JSONL, CSV and Parquet, the shipped facts, task files, LAMA's relations, word lists, and seeded splits. Nothing here
loads a model or trains; for tokenizers there is a protocol in ``template``.

Read first: ``reading``, ``questions``, ``splits``; then ``task_files`` or ``relations``.
"""
