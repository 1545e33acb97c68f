"""Trained models leave the suite: as a graph for another runtime (``export/``), or behind a URL (``service/``)."""
