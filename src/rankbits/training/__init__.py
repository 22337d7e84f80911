"""How it learns: loss terms, phases, optimizer groups and the glue to the Trainer."""
