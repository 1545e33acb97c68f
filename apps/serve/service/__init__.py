"""``moesaic serve``: a trained model answers requests over HTTP.

The modules, from the ground up: ``options`` (the command line, limits and token), ``reading`` (a body's bytes to
inputs), ``batching`` (inputs of several requests to one batch), ``guard`` (who may ask, how much, and the metrics),
``application`` (the paths, OpenAPI, and a page), ``protocol`` (connections, and the server), ``command`` (the whole).
"""
