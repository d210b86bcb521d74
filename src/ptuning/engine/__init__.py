"""One batch through the backbone; everything that must be fast is here. It must not know files or optimizers.

Read first: ``learned``, ``batch``, ``passes``, ``prefix_cache``, ``objective``, ``evaluate``; then the room of written
answers.
"""
