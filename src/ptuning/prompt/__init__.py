"""The prompt as an artifact, and its use after training.

Saving and loading, predicting, ranking, classifying, scoring and inspecting. It must not know how a prompt was
trained.

Read first: ``prompt``, ``predict``, ``answer``, ``score``, ``inspect``.
"""
