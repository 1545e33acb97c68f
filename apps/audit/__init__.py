"""``moesaic audit``: faults of a checkpoint's experts and routers, from its files alone.

The modules, from the ground up: ``options`` (the command line), ``checkpoint`` (the files, their index, and the layer
and expert of each tensor), ``rules`` (what is wrong with them), ``command`` (the whole). It ends with 1 if there are
findings.
"""
