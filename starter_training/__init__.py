"""Training of the starter model and its judge; not part of the installed package."""
