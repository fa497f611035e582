"""The merge methods: one module each, named like its one function (formulas: each function's paper).

Shapes in all of them: J targets, N elements of one tensor. `deltas_JN` holds float32 differences from the base.
"""
