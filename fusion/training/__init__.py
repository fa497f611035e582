"""Training: a copy of the pivot learns the fused distributions, under Lightning."""
