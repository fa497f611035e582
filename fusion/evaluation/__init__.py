"""Evaluation: what a model can do, per skill and item, with the numbers needed to judge a difference."""
