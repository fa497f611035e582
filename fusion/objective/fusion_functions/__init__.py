"""Fusion functions, one file each: from the models' cross-entropies to their shares in the targets.

A fusion function takes `ce_UM`, float64 [U, M] in nats: one row per unit (a dialogue, a span or a token, as
`fusion.level` says), the pivot first and then the sources. Infinite where a model has nothing to say. It returns the
shares [U, M], none negative, every row with the sum 1. `fusion.name` is a file's name here, or the dotted path of your
own function.
"""
