"""How fast ptuning is, measured beside its strongest alternative and the bare backbone. Outside the package."""
