"""A Hugging Face language model: found, loaded, probed, run; alone imports transformers. It must not know prompts.
Read first: ``sources``, ``loading``, ``backbone``, ``forward``, ``probes``, ``tokenizer``.
"""
