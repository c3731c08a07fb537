"""Reports: the summary table, ``report.json`` and the self-contained HTML page."""
