"""What a job would need, from its settings alone: nothing is loaded, and no library for models is imported."""
