"""``moesaic plan``: the memory, the traffic and the time of a training on many GPUs, only from its configuration.

The modules, from the ground up: ``formulas`` (pure functions of plain numbers, and published peaks of GPUs),
``options`` (the command line), ``outline`` (a model on the meta device, measured), ``layout`` (how a mesh lies on
machines, the cost of a step on it, and the best), ``command`` (the whole: table and overlay).
"""
