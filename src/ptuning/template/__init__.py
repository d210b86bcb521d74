"""The template language, and how a template becomes token ids.

Parsing patterns, tokenising text across slots as one string, truncating long records to the context, and label words
(the verbalizer). It must not know a model: a tokenizer comes in as the protocol
:class:`~ptuning.template.segments.Tokenizer`.

Read first: ``language``, ``segments``, ``fill``, ``labels``.
"""
