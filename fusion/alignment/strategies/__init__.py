"""The named alignment strategies: one module each, with `build(pair, statistics, **options) -> Alignment`."""
