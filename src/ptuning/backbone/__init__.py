"""A Hugging Face language model: found, loaded, probed, copied, run. The only room with transformers and peft.
Read first: ``sources``, ``loading``, ``backbone``, ``forward``, ``probes``, ``tokenizer``.
"""
