"""Search by text or image: vectors, indexes, zero-shot classes, pages."""
