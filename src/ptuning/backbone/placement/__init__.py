"""Where the weights of a model lie and in which form: devices, disk, several processes, quantised. It must not know
what a model is run for.
Read first: ``devices``, ``stored``, ``quantized``, ``shards``.
"""
