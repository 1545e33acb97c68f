"""``moesaic demo``: a page on this machine on which a trained model is tried out, and shows its experts in action.

The modules, from the ground up: ``options`` (the command line), ``drawing`` (answers and experts as HTML), ``page``
(the page in Gradio), ``command`` (examples of the run's data, the server only for this machine, and the whole).
"""
