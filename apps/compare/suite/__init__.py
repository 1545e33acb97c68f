"""``moesaic compare --suite FILE``: a queue of trainings, board by board, which resumes where it was and writes a
leaderboard.

The modules, from the ground up: ``file`` (the command line, and the suite file: boards and their entries),
``standings`` (what finished runs have shown, as JSON, as the rows of a board and as a page), ``command`` (the runs, in
order, and the whole).
"""
