"""A whole experiment as data: schema, shipped recipes, methods and the run itself."""
