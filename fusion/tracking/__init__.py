"""Tracking: the record of every job, its mirrors in experiment loggers, and comparisons of jobs."""
