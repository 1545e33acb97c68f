"""A report as one self-contained HTML file: apps and commands give its contents, ``write_page`` writes it.

A ``Page`` has a verdict, at most ten lines of figures, and sections; a ``Section`` has parts: ``Text``, ``Table``,
``Code``, ``Picture``, ``Gallery``, ``Words``, and the charts ``ScatterChart``, ``LineChart``, ``BarChart``,
``HeatmapChart``. All are plain values, so that ``save_sections`` and ``load_sections`` keep them between commands. A
page is made so::

    page = Page(
        title="Sparse and dense on digits",
        verdict=("Sparse wins at equal FLOPs: +0.8 points, 95 % interval +0.2 to +1.4.",),
        figures=Table("", ("", "sparse", "dense"), (("test top1, %", "97.2", "96.4"),)),
        sections=(
            Section("Quality against cost", (ScatterChart("...", "...", "MFLOPs", "top1, %", points),)),
            how_to_repeat(command="moesaic compare configs/vision/digits.yaml", config=yaml_text),
        ),
        kind="comparison",
        date=moment(),
    )
    show_page(page)                             # the verdict and the figures, on the terminal
    write_page(page, output / "report.html")    # everything, and prints its path
    write_index(output.parent)                  # index.html over several runs
    open_page(output / "report.html")           # for --open

No app is named here: an app's test report makes sections of its results (``apps.report.base.Report.write``).
"""

from apps.report.page.charts import BarChart, HeatmapChart, Line, LineChart, Point, ScatterChart
from apps.report.page.html import png_of, save_charts
from apps.report.page.parts import (
    MOST_FIGURES,
    Code,
    Entry,
    Gallery,
    Page,
    Part,
    Picture,
    Section,
    Table,
    Text,
    Thumbnail,
    Words,
    how_to_repeat,
    shown,
)
from apps.report.page.writing import FILE, SECTIONS, load_sections, open_page, save_sections, show_page, write_page
