"""The built-in tiny world: models, tokenisers and dialogues made on the spot, so that everything runs offline."""
