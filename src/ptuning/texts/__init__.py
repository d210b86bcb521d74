"""Metrics for texts: what a written text is worth beside its references, or beside the attributes that it should say.

It must not know models or prompts: texts and records come in, scores with intervals go out. The libraries behind the
metrics are extras, loaded by the metric that needs them.

Read first: ``table``, which names every metric; then the file of a metric.
"""
