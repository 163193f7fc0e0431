"""What the tasks take from inside lm-evaluation-harness and datasets, because they have no public call for it."""

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.model.loading import quiet

__all__ = ["quiet_harness", "untied"]

_LIBRARIES = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "fsspec", "absl", "sacrebleu", "rouge_score")
#: Where the harness shows bars of its own.
_WITH_BARS = ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface")
#: Read when a task's own code imports the package that fetches metrics, which are code.
_NO_METRICS = "HF_EVALUATE_OFFLINE"


@contextlib.contextmanager
def untied(network: Any) -> Iterator[None]:
    """Keeps the harness from tying a model's output head to its embedding again.

    lm_eval: ``HFLM`` calls the model's ``tie_weights`` without being asked, which does so where the configuration says
    so, even if the checkpoint holds two that differ.
    """
    network.tie_weights = lambda *_args, **_how: None
    try:
        yield
    finally:
        del network.tie_weights


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keeps the harness and what it needs quiet, from telling the Hub what is read, and from running code of it.

    lm_eval: its progress bars are ``tqdm`` as three modules have imported it, and cannot be switched off; a metric that
    it does not know is fetched from the Hub by ``get_metric``, and is code. datasets: only a variable of its
    configuration keeps it from telling the Hub.
    """
    import datasets
    import lm_eval.api.task as definitions
    from lm_eval.api.registry import metric_registry
    from tqdm import tqdm

    def registered(name: str, hub: bool = False) -> Any:  # noqa: FBT001, FBT002 - the harness calls it so
        if hub or name not in metric_registry:
            raise EvaluateError(
                f"its metric {name} is none of the harness's own; it would be code from the Hub, which is not run"
            )
        return metric_registry.get(name)

    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with_bars = [importlib.import_module(name) for name in _WITH_BARS]
    counts, hidden = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.are_progress_bars_disabled()
    metrics, offline = definitions.get_metric, os.environ.get(_NO_METRICS)
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        for module in with_bars:
            vars(module)["tqdm"] = lambda *given, **how: tqdm(*given, **{**how, "disable": True})
        definitions.get_metric = registered
        os.environ[_NO_METRICS] = "1"
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        datasets.disable_progress_bars()
        with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})\b")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for module in with_bars:
            vars(module)["tqdm"] = tqdm
        definitions.get_metric = metrics
        if offline is None:
            del os.environ[_NO_METRICS]
        else:
            os.environ[_NO_METRICS] = offline
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if not hidden:
            datasets.enable_progress_bars()
