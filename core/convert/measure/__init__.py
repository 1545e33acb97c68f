"""What experts are worth: statistics, widths, summaries."""
