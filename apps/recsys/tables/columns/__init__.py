"""How the columns of a row become vectors: embeddings, numbers, histories, texts."""
