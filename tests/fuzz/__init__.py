"""Random problems for everything public, against independent formulas in float64.

`python -m pytest tests/fuzz` runs a few of each, ``make fuzz MINUTES=30`` as many as fit.
"""
