"""Fuzzers: inputs that are broken, hostile or nearly right. `kinds` has them, `run` tries as many as are asked for."""
