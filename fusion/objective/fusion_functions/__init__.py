"""Fusion functions, one file each: from the models' cross-entropies on a dialogue to their shares in its targets.

A fusion function takes `ce_M`, float64 [M] in nats per unit, the pivot first and then the sources, and returns the
shares [M] that sum to 1. `fusion.name` is a file's name here, or the dotted path of your own function.
"""
