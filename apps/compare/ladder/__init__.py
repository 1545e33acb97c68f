"""``moesaic compare CONFIG --ladder 1,3,10,30``: at which training budget does sparse pay?

The modules, from the ground up: ``options`` (the command line), ``growth`` (the section ``ladder``), ``curves`` (loss
against FLOPs, with intervals), ``rungs`` (what each trains, and what came), ``page`` (sentences and report),
``command`` (the whole).
"""
