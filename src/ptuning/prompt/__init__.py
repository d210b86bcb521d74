"""The prompt as an artifact, and its use after training: save, load, predict, rank, classify, score and inspect.

It must not know how a prompt was trained.

Read first: ``prompt``, ``storage``, ``asked``, ``predict``, ``answer``, ``score``, ``inspect``.
"""
