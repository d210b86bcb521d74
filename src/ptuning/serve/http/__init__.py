"""The service over HTTP: what is asked in OpenAI's words becomes rows of the engine, and outcomes become answers.

It must not know torch or the tokenizer: those belong to the engine's thread.
Read first: ``app``, ``front``, ``service``, ``replies``, ``questions``. Then the room of the routes.
"""
