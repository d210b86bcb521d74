"""Computing by a vLLM server: names, templates, labels and keys stay here, and vLLM runs the filled rows.

It must not know HTTP routes of our own or the names of prompts.
Read first: ``gateway``, ``remote``.
"""
