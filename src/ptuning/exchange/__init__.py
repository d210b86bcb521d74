"""Prompts in the forms of other programs: PEFT, vLLM, llama.cpp; written, read back there and compared.

Knows peft and transformers; must not know how prompts are trained, nor print. Read first: ``export``, then ``rows``,
``form``; a module for each form: ``embedding_lora``, ``prompt_tuning``, ``added_tokens``,
``gguf_copy``, ``embeddings``; then ``reserved``,
``peft_files`` and ``card``; ``imports`` is the way back.
"""
