"""The apps: vision, recommendation, translation and image with text, on one Lightning command line."""
