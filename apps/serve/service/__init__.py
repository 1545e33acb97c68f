"""``moesaic serve``: a trained model answers requests over HTTP.

The modules, from the ground up: ``options`` (the command line, limits and token), ``reading`` (a body's bytes to
inputs), ``batching`` (inputs of several requests to one batch), ``metrics``, ``guard`` (who may ask, and how much),
``interface`` (OpenAPI, and a page), ``application`` (the paths), ``protocol`` (connections, and the server),
``command`` (the whole).
"""
