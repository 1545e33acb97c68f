"""Questions to SQL: the schema of a database, queries that only read, and made questions."""
