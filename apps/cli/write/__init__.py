"""Output of the commands: files of predictions (``predictions``, with ``row_groups`` for Parquet and ``partial`` for
one that a stopped run has begun) and the page of a test's report (``page``)."""
