"""A Hugging Face language model as ptuning sees it: found, loaded, probed, frozen, copied and run.

Also LoRA adapters, trained weights and activation checkpointing. The only room that imports transformers and peft. It
must not know prompts, batches or training.

Read first: ``sources``, ``loading``, ``backbone``, ``forward``, ``probes``, ``tokenizer``.
"""
