"""``moesaic convert KIND``: trained runs made sparse, dense, smaller or one, as a run that every command reads.

The modules, from the ground up: ``options`` (the command line), ``runs`` (a trained run, its conversion, and the new
one, written tensor by tensor), ``kinds`` (each conversion), ``figures`` (the cost and score of a run), ``command`` (the
whole).
"""
