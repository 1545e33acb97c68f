"""``moesaic plan``: the memory, the traffic and the time of a training on many GPUs, from its configuration alone.

The modules, from the ground up: ``formulas`` (pure functions of plain numbers, and published peaks of GPUs),
``options`` (the command line), ``outline`` (a model on the meta device, measured), ``layout`` (how a mesh lies on
machines, what a step costs on it, and the best), ``command`` (the whole: table and overlay).
"""
