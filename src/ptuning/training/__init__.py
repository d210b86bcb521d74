"""Learning prompts: from the description of a training to a saved prompt.

The description (``TrainSpec``), the prompt encoder, the optimizer step, the training loop with early stopping,
checkpoints, one run, many runs at once (a fleet), and estimates. It must not know methods of a comparison.

Read first: ``spec``, ``prepare``, ``optimizer``, ``step``, ``trainer``, ``checkpoint``, ``run``, ``fleet``.
"""
