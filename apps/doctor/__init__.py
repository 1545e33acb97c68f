"""``moesaic doctor``: problems in the routing of a trained run, or of one that is still in training.

The modules: ``options`` (the command line), ``command`` (what ``metrics.csv`` says, the model on its validation data,
and the whole). It ends with 1 if there are findings.
"""
