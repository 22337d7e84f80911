"""Where we sit inside a model: the PEFT boundary."""

# PEFT first: its import registers our tuners, which must not be half imported themselves by then.
import peft  # noqa: F401
