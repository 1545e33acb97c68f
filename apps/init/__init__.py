"""``moesaic init``: a first configuration for a user's data, with comments, ready for ``moesaic fit``.

The modules, from the ground up: ``options`` (the command line), ``commented`` (YAML with comments), ``command`` (the
whole). The apps say what the data hold (``Task.own_data``). Nothing is trained.
"""
