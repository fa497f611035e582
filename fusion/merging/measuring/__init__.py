"""Measuring on dialogues what some methods weigh targets by: one file for each kind of evidence.

A measure is a function `measure(study, *, setting=default, ...) -> Evidence`; a method names it in
`@merge_method(evidence=measure)`, and its settings become parameters of the method. Results are kept in the cache.
"""
