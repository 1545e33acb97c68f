"""One transformer for translation, language and item sequences: attention, layers, positions, caches, losses."""
