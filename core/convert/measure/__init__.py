"""The value of experts: statistics, widths, summaries."""
