"""The files of the standard tables and of a user's own, as ``RawTables``: values as they are in the files."""
