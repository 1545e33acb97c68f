"""``moesaic convert KIND``: trained runs made sparse, dense, smaller or one, as a run that every command reads.

The modules, from the ground up: ``options`` (the command line), ``streaming`` (a checkpoint written tensor by tensor),
``runs`` (a trained run, what a conversion makes of it, and the folder of a new one), ``kinds`` (each conversion),
``figures`` (what a run costs and scores), ``own`` (a user's own module), ``command`` (the whole).
"""
