"""The results of a run for people: statistics, plots, self-contained HTML pages."""
