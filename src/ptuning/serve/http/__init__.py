"""The service's HTTP side: routes, keys, limits, errors, metrics and the access log.

It must not know torch or how rows are answered: it makes jobs of requests, and answers of outcomes.
Read first: ``admin``, ``watch``.
"""
