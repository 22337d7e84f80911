"""Where we sit inside a model: the PEFT boundary."""
