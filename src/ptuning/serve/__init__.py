"""Prompts in service: one model in memory, many prompts, and rows of any of them in one batch.

It must not know how prompts are trained or compared. ``engine`` runs the rows and knows no HTTP.
Read first: ``registry``, and the room of the engine.
"""
