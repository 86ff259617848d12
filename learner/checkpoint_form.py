"""Weights under the names and in the shapes of checkpoint files: what an engine's loader takes, whatever the model.

transformers holds some models in another form than their files do: the experts of a layer as one tensor, modules under
other names. Its own table of conversions, which also writes checkpoints, turns them back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class CheckpointForm:
    """Turns the weights of one model into the form of its files, a decoder layer at a time."""

    def __init__(self, model: Any, as_loaded: bool = False) -> None:
        """``model`` is of transformers; any other is taken to hold its weights as its files do.

        With ``as_loaded`` the form is that of the very files that it was loaded from, whose names may be older ones.
        """
        self._model = model
        loaded = getattr(model, "_weight_conversions", None) if as_loaded else None
        self._conversions = _conversions(model) if loaded is None else loaded

    def __call__(self, group: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """``group`` of names and whole tensors, converted; it must hold all that belongs together, as a layer does."""
        if not self._conversions:
            return group
        from transformers.core_model_loading import revert_weight_conversion

        before = getattr(self._model, "_weight_conversions", None)
        self._model._weight_conversions = self._conversions
        try:
            return list(revert_weight_conversion(self._model, dict(group)).items())
        finally:
            self._model._weight_conversions = before


def _conversions(model: Any) -> list[Any]:
    """Those of the model's class, without what one file may have otherwise: an old name, a prefix left out."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if not isinstance(model, PreTrainedModel):
        return []
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
