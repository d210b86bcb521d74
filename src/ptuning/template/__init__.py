"""The template language, and how a template becomes token ids. It must not know a model, only a tokenizer.

Read first: ``language``, ``segments``, ``known``, ``turns``, ``chat``, ``fill``, ``labels``.
"""
