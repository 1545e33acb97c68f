"""Units of work that are done once, under ``compare``, its suites, ``verdict`` and ``test --sweep``.

The modules, from the ground up: ``budget`` (the seconds that there are), ``unit`` (one training and its files),
``workers`` (several units at a time), ``runner`` (units in order, with their bars and lines), ``folder`` (the folder
that the units are in, which belongs to one piece of work).
"""
