"""The exceptions of ablate-shards, all in one tree.

::

    AblateError                 every error a user can cause or meet; the command line prints it as one sentence
    ├── UsageError              wrong arguments or options (exit code 2)
    │   └── RecipeError         a recipe that cannot be read, or that names an unknown key
    ├── CheckpointError         a source checkpoint that is malformed, incomplete or unsafe to read
    ├── ArchitectureError       an architecture whose residual writers cannot be determined
    ├── ActivationsError        an activation dump that cannot be used
    ├── SamplesError            a file of pairs, instructions or questions that cannot be used
    ├── CaptureError            a model whose activations cannot be captured, or a dump that cannot be written
    ├── AdapterError            an adapter that cannot be read, or that does not fit the checkpoint
    ├── FinetuneError           a model, its chat template or data that cannot be trained with
    ├── DirectionsError         directions that cannot be computed, read or applied
    ├── PlanError               an edit that cannot be planned (coverage, dtype, shape)
    ├── ExecuteError            a run that cannot start, go on or be resumed
    │   ├── ChangedError        an interrupted run that was of something else
    │   └── Interrupted         stopped by Ctrl-C or SIGTERM; resumable
    ├── EvaluateError           a model, an endpoint or an evaluation that cannot be asked, read or compared
    ├── SearchError             a search that cannot start or go on, or that finds nothing within its budget
    ├── GateError               an edit that broke the model, which ends a run
    ├── HubError                a repository or an object store that cannot be read or written
    ├── ReportError             a folder without anything to report, or a broken part of it
    └── VerifyError             an output that cannot be verified at all (no receipt, newer receipt)
"""

__all__ = [
    "AblateError",
    "ActivationsError",
    "AdapterError",
    "ArchitectureError",
    "CaptureError",
    "ChangedError",
    "CheckpointError",
    "DirectionsError",
    "EvaluateError",
    "ExecuteError",
    "FinetuneError",
    "GateError",
    "HubError",
    "Interrupted",
    "PlanError",
    "RecipeError",
    "ReportError",
    "SamplesError",
    "SearchError",
    "UsageError",
    "VerifyError",
    "reason",
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
    """The tensors that write to the residual stream cannot be determined."""


class ActivationsError(AblateError):
    """An activation dump cannot be used."""


class SamplesError(AblateError):
    """A file of pairs, instructions or questions cannot be used."""


class CaptureError(AblateError):
    """A model's activations cannot be captured or written."""


class AdapterError(AblateError):
    """An adapter cannot be read, or does not fit the checkpoint."""


class FinetuneError(AblateError):
    """A model cannot be trained on these data."""


class DirectionsError(AblateError):
    """Directions cannot be computed, read or applied."""


class PlanError(AblateError):
    """An edit cannot be planned."""


class ExecuteError(AblateError):
    """A run cannot start, go on or be resumed."""


class ChangedError(ExecuteError):
    """An interrupted run was of something else, so that it cannot be resumed."""


class Interrupted(ExecuteError):  # noqa: N818 - the user asked for it
    """A run was stopped by Ctrl-C or SIGTERM and can be resumed."""


class EvaluateError(AblateError):
    """A model or an endpoint cannot be evaluated, or an evaluation cannot be read or compared."""


class SearchError(AblateError):
    """A search cannot start or go on, or finds nothing within its budget."""


class GateError(AblateError):
    """An edit broke the model, and the run ends before more is built on it."""


class HubError(AblateError):
    """A repository or an object store cannot be read or written."""


class ReportError(AblateError):
    """There is nothing to report, or a part of the report cannot be read."""


class VerifyError(AblateError):
    """An output cannot be verified."""


def reason(error: Exception) -> str:
    """Returns the first line of what a library says."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
