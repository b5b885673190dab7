"""Which channels: one file per selection method, each one function of the Selector shape (curve.py)."""
