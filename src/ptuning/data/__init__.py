"""From files to questions: data files, the shipped facts, conversations (``chat/``),
task files, LAMA's relations, word lists and seeded splits.

It must not load a model or train. A tokenizer comes in as the protocol ``Tokenizer`` of ``template.segments``.

Read first: ``reading``, ``questions``, ``splits``; then ``task_files`` or ``relations``.
"""
