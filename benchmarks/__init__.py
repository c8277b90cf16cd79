"""Measurements against the libraries that people use today: ``pytest benchmarks/``, ``python -m benchmarks.report``."""
