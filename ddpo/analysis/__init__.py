"""A run read as data: history, SQL, datasets, reports, comparisons."""
