"""Model folders as a merge reads and writes them: checked, in place, and safe from kills."""
