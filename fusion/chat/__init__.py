"""Talk to several models at once, the fused one next to its pivot and sources."""
