"""Text generation: ``generate`` answers rows, ``decoder`` decodes a batch token by token."""
