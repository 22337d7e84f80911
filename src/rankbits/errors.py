"""Every exception and warning that rankbits raises on purpose."""

from __future__ import annotations


class RankbitsError(Exception):
    """Something the user gave, or the state of a run, cannot be worked with.

    The message says what was given, what was expected and where. The command line prints it and exits with 2.
    """


class RecipeError(RankbitsError):
    """A recipe, or an override of one, is not valid. All problems of one recipe are reported together."""


class TaskError(RankbitsError):
    """A task is unknown, or its data is missing, malformed or empty."""


class ModelError(RankbitsError):
    """A model cannot be found, loaded or adapted."""


class UnknownArchitectureError(ModelError):
    """No formula knows this model type; its cost can still be counted on the live model."""


class AssetError(RankbitsError):
    """An embedded file is missing or is not the file it claims to be."""


class RunFolderError(RankbitsError):
    """A run folder holds something else, is unfinished, or cannot be written."""


class RecordError(RankbitsError):
    """A run record cannot be read."""


class ScheduleError(RankbitsError):
    """The gate schedule was never stepped, was stepped for another number of steps, or cannot run here."""


class MergeError(RankbitsError):
    """Merging would change what the model computes."""


class HardenError(RankbitsError):
    """A model cannot be hardened in its present state."""


class ExportError(RankbitsError):
    """A model cannot be written in a format, or what was written does not compute what the model does."""


class NonFiniteError(RankbitsError):
    """A loss, an activation or a gradient became NaN or infinite during training."""


class RankbitsWarning(UserWarning):
    """Something works, but probably not as its user expects."""
