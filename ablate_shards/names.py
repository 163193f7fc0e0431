"""Names of the files that runs leave, and the marks by which they are known."""

__all__ = [
    "ADAPTER_RECEIPT_NAME",
    "BEGIN",
    "CARD",
    "CONFIG_NAME",
    "DEQUANTISATION_RECEIPT_NAME",
    "END",
    "MERGE_RECEIPT_NAME",
    "NARROWING_NAME",
    "PLOTS_NAME",
    "RECEIPT_NAME",
    "RECEIPT_NAMES",
    "REPORT_NAME",
    "SEARCH_SUFFIX",
    "STATE_NAME",
    "TRAINING_NAME",
    "WEIGHTS_NAME",
    "is_report",
]

RECEIPT_NAME = "ablation.json"
MERGE_RECEIPT_NAME = "merge.json"
DEQUANTISATION_RECEIPT_NAME = "dequantisation.json"

#: The receipts by which a folder that an earlier run made is known.
RECEIPT_NAMES = (RECEIPT_NAME, MERGE_RECEIPT_NAME, DEQUANTISATION_RECEIPT_NAME)

REPORT_NAME, PLOTS_NAME = "report.html", "plots"


def is_report(name: str) -> bool:
    """Whether a file of an edited checkpoint belongs to its report, which is not part of the checkpoint."""
    return name == REPORT_NAME or name.startswith(f"{PLOTS_NAME}/")


#: An adapter folder's files: the receipt of one that was extracted from an edit, the record of a training, and that of
#: how an edit was narrowed.
ADAPTER_RECEIPT_NAME = "adapter.json"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TRAINING_NAME = "training.json"
NARROWING_NAME = "narrowing.json"

#: What the name of a search's record ends in.
SEARCH_SUFFIX = ".search.json"

#: The file that the Hub shows as a model's card.
CARD = "README.md"

BEGIN = "<!-- ablate-shards: what follows is generated and replaced by the next push -->"

#: What a run of a recipe has done so far.
STATE_NAME = "stages.json"

END = "<!-- ablate-shards: end of what is generated -->"
