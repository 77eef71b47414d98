"""How the starter model and its judge were trained; not part of the installed package."""
