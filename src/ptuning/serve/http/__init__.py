"""The service over HTTP: OpenAI's routes, predictions, and routes for operators. It does not know how rows are run.

Read first: ``app``, ``routes``, ``service``.
"""
