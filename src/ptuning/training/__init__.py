"""Learning prompts: from the description of a training to a saved prompt.

Read first: ``spec``, ``prepare``, ``encoder``, ``step``, ``trainer``, ``checkpoint``, ``run``, ``train_fleet``.
"""
