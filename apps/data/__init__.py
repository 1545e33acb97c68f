"""Data for all apps: sources, encoded columns on disk, and a loader that resumes exactly."""
