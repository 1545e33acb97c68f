"""Where data comes from and how it is served: sources, encoded columns on disk, and a loader that resumes exactly."""
