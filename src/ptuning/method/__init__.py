"""The contestants of a comparison.

Majority, manual prompt, in-context examples, P-tuning, fine-tuning and LoRA, in one registry. It must not know
benchmarks, cells or reports.

Read first: ``base``, ``items``.
"""
