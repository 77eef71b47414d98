"""Comparisons of algorithms on equal terms: the plan of the runs, their results, the report."""
