"""``moesaic convert KIND``: trained runs made sparse, dense, smaller or one, as a run that every command reads.

The modules, from the ground up: ``options`` (the command line), ``runs`` (a trained run, what a conversion
makes of it, and the new one, written tensor by tensor), ``kinds`` (each conversion),
``figures`` (what a run costs and scores), ``command`` (the whole).
"""
