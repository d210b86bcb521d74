"""Learning prompts.

The prompt encoder, the optimizer step, the training loop with early stopping, checkpoints, one run, many runs at once
(a fleet), and what a run will cost. It must not know methods that a comparison puts beside it.

Read first: ``encoder``, ``step``, ``trainer``, ``checkpoint``, ``run``, ``train_fleet``.
"""
