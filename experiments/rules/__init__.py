"""Data made by rule: the same rows on every machine, without random generators."""
