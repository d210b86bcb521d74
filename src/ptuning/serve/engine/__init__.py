"""Engine of the server: one thread answers the rows of many requests on one model, rows of any prompts in one pass.

It must not know HTTP, the names of prompts or their files.
"""
