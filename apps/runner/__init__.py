"""Units of work that are done once, under ``compare``, its suites, ``verdict`` and ``test --sweep``.

The modules, from the ground up: ``unit`` (one training and its files), ``workers`` (several units at a time),
``runner`` (units in order, with their bars and lines, the seconds that there are, and the folder that they are in).
"""
