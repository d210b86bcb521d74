"""Serving: one model in memory, many prompts, rows of any of them in one batch.

``engine`` runs the rows and knows no HTTP; ``registry`` holds the prompts by name; ``http`` has the routes.
"""

# Defaults of `ptuning serve` and of what it starts.
HOST, PORT = "127.0.0.1", 8000
QUEUE_ROWS = 256
CACHE_MEMORY = 0.2
DRAIN_SECONDS = 30.0
