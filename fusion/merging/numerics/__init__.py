"""What merge methods compute with: sums over targets, selections, random masks, directions."""
