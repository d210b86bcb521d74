"""One batch through the backbone; everything that must be fast is here.

Padding, writing learned vectors in (injection), reuse of the KV cache, logits at target positions, losses, and
generation. It must not know files, epochs or optimizers.

Read first: ``learned``, ``batch``, ``passes``, ``prefix_cache``, ``objective``, ``evaluate``, ``generate``.
"""
