"""Fusion: several chat models in, one better model of the pivot's size out.

The folders are the steps of the method, in the order data meets them: `dialogues`, `teaching`, `alignment`,
`objective`, `training`, `merging`, `evaluation`, `tracking`. Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
