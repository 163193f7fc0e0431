"""What the capture takes from inside transformers, because it has no public call for it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["WeightLoader"]


class WeightLoader:
    """Loads some tensors of a checkpoint into a model that has no weights, converted as ``from_pretrained`` does it.

    transformers: ``from_pretrained`` loads a model whole. What it does with each tensor (rename it, split or join it,
    and give it its dtype) is in ``conversion_mapping`` and ``core_model_loading``, which are not documented, and in the
    model's ``_get_dtype_plan``.
    """

    def __init__(self, model: Any, device: "torch.device") -> None:
        """Finds what transformers knows of a model's weights.

        Args:
            model: The model.
            device: Where its weights are to be.

        Raises:
            ImportError, AttributeError, TypeError: This version of transformers does it in another way.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.modeling_utils import LoadStateDictConfig

        self._model = model
        self._known = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=mapping,
        )

    def target(self, name: str) -> str | None:
        """Returns the parameter that a tensor of the checkpoint becomes or is part of, None if there is none."""
        from transformers.core_model_loading import rename_source_key

        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            target, _ = rename_source_key(name, renamings, converters, self._model.base_model_prefix, self._known)
            if target in self._known:
                return str(target)
        return None

    def load(self, tensors: Mapping[str, Any]) -> list[str]:
        """Loads tensors, given as slices of their files; returns what of them does not fit the model."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        found, _ = convert_and_load_state_dict_in_model(self._model, tensors, self._config, None)
        return [*found.conversion_errors, *(str(name) for name, *_ in found.mismatched_keys)]
