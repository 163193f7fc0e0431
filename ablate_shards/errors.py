"""The exceptions of ablate-shards, all in one tree.

::

    AblateError                 every error a user can cause or meet; the command line prints it as one sentence
    ├── UsageError              wrong arguments or options (exit code 2)
    │   └── RecipeError         a recipe that cannot be read, or that names an unknown key
    ├── CheckpointError         a source checkpoint that is malformed, incomplete or unsafe to read
    ├── ArchitectureError       an architecture whose residual writers cannot be told
    ├── ActivationsError        an activation dump that cannot be used
    ├── DirectionsError         directions that cannot be computed, read or applied
    ├── PlanError               an edit that cannot be planned (coverage, dtype, shape)
    ├── ExecuteError            a run that cannot start, go on or be resumed
    │   └── Interrupted         stopped by Ctrl-C or SIGTERM; resumable
    └── VerifyError             an output that cannot be verified at all (no receipt, newer receipt)
"""

__all__ = [
    "AblateError",
    "ActivationsError",
    "ArchitectureError",
    "CheckpointError",
    "DirectionsError",
    "ExecuteError",
    "Interrupted",
    "PlanError",
    "RecipeError",
    "UsageError",
    "VerifyError",
]


class AblateError(Exception):
    """What every error of this package derives from; its text is one sentence for the user."""


class UsageError(AblateError):
    """The command was given wrong arguments or options."""


class RecipeError(UsageError):
    """A recipe cannot be read, or names a key that does not exist."""


class CheckpointError(AblateError):
    """A checkpoint is malformed, incomplete or unsafe to read."""


class ArchitectureError(AblateError):
    """The tensors that write to the residual stream cannot be told."""


class ActivationsError(AblateError):
    """An activation dump cannot be used."""


class DirectionsError(AblateError):
    """Directions cannot be computed, read or applied."""


class PlanError(AblateError):
    """An edit cannot be planned."""


class ExecuteError(AblateError):
    """A run cannot start, go on or be resumed."""


class Interrupted(ExecuteError):  # noqa: N818 - the user asked for it
    """A run was stopped by Ctrl-C or SIGTERM and can be resumed."""


class VerifyError(AblateError):
    """An output cannot be verified."""
