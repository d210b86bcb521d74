"""Fuzzers: inputs that are broken, hostile or nearly right are accepted, or end in one PTuningError with a message."""
