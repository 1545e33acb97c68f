"""``moesaic audit``: faults of a checkpoint's experts and routers, from its files alone.

The modules, from the ground up: ``options`` (the command line), ``checkpoint`` (the files, their index, and the layer
and expert of each tensor), ``holes`` (what is missing, misnamed or of another shape or dtype), ``values`` (experts,
routers and biases whose numbers are wrong), ``command`` (the whole). It ends with 1 if there are findings.
"""
