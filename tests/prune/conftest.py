"""Makes nets.py importable for the tests of the sub-packages."""
