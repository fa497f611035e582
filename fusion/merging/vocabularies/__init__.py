"""Models whose tokens differ: which rows belong together, and the tokeniser of the merged model."""
