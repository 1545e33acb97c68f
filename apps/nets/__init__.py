"""One transformer for translation, language and histories: attention, layers, positions, caches, losses."""
