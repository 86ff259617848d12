"""What transformers makes of a model folder: its configuration and its class, on the meta device and without values.

The rules for names of weights (renamed keys, fused experts, tied heads) are those of the library, because its own loader
is given tensors that have a shape and no content.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from learner.model_folder import make_savable, refuse_missing
from learner.saving import write_settings
from shared.errors import InputError, one_line

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the names of classes of causal language models end."""
COPIED = (
    "num_attention_heads",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "vocab_size",
    "model_type",
)
"""Names that configuration classes map to older ones."""


def read(path: str, raw: dict[str, Any], trusted: bool) -> Any:
    """Return transformers' configuration of the folder ``path``, whose config.json is ``raw``.

    Raises ``InputError`` E412 for a type of model that it does not know, E401 for a configuration that it cannot read.
    """
    kind, place = raw.get("model_type"), f"{path}/config.json"
    remote = trusted and "AutoConfig" in (raw.get("auto_map") or {})
    if str(kind) not in CONFIG_MAPPING and not remote:
        expected, fix = f"a type that transformers {transformers.__version__} knows", "use another model"
        found = f"model_type {kind} of {(raw.get('architectures') or ['a model'])[0]}"
        raise InputError("E412", "architecture not supported", f"{place}:model_type", found, expected, fix)
    try:
        with quiet():
            return AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    except Exception as error:  # Its validators raise whatever they like.
        expected = "a configuration that transformers reads"
        raise InputError("E401", "model not readable", place, one_line(error), expected, "correct it") from None


def canonical(configuration: Any) -> dict[str, Any]:
    """Return the keys of the text model under their current names, with the defaults of its class."""
    text = configuration.get_text_config(decoder=True)
    table: dict[str, Any] = text.to_dict()
    for name in (*COPIED, *getattr(text, "attribute_map", {})):
        with contextlib.suppress(Exception):  # Attributes that differ between layers raise.
            table.setdefault(name, getattr(text, name))
    return table


def build(path: str, configuration: Any, trusted: bool) -> Any:
    """Return the model of ``configuration`` without values. Raises ``InputError`` E412 if the learner cannot train it."""
    place = f"{path}/config.json:architectures"
    named = (getattr(configuration, "architectures", None) or [""])[0]
    expected, fix = "a causal language model of text that transformers knows", "use another model"
    known = type(configuration) in AutoModelForCausalLM._model_mapping
    remote = trusted and "AutoModelForCausalLM" in (getattr(configuration, "auto_map", None) or {})
    found = named or str(configuration.model_type)
    if not (known or remote) or configuration.is_encoder_decoder:
        raise InputError("E412", "architecture not supported", place, found, expected, fix)
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configuration, trust_remote_code=trusted)
    except Exception as error:  # Whatever the constructor of a strange configuration raises.
        told, sound = f"{type(error).__name__}: {one_line(error)}", "a configuration of which a model can be built"
        raise InputError("E401", "model not readable", f"{path}/config.json", told, sound, "correct it") from None
    ours = type(model).__name__
    if not ours.endswith(CAUSAL) or (named and named != ours and not named.endswith(CAUSAL)):
        raise InputError("E412", "architecture not supported", place, found or ours, expected, fix)
    _refuse_layers(path, model)
    return model


def _refuse_layers(path: str, model: Any) -> None:
    """Raise ``InputError`` E412 for token mixers other than attention, and attention that cannot be replaced."""
    place, expected, fix = path, "attention that transformers lets others replace", "use another model"
    if not getattr(model, "_supports_attention_backend", False):
        found = f"{type(model).__name__}, whose attention is its own"
        raise InputError("E412", "attention not supported", place, found, expected, fix)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        found, straight = f"{type(model).__name__}, whose output head has a bias", "an output head without bias"
        raise InputError("E412", "output head not supported", place, found, straight, fix)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
            raise InputError("E412", "layers not supported", place, f"{name}: a convolution", expected, fix)
    for name, _ in model.named_parameters():
        if "sink" in name.rpartition(".")[2]:
            raise InputError("E412", "attention not supported", place, f"{name}: attention sinks", expected, fix)


def check_weights(path: str, model: Any, tensors: dict[str, dict[str, Any]]) -> list[str]:
    """Compare ``tensors`` (name -> ``shape``) of the folder ``path`` with ``model`` without values, which is used up.

    Returns warnings about tensors that are not used. Raises ``InputError`` E411 if any are missing or of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    state = {name: torch.empty(tensor["shape"], device="meta") for name, tensor in tensors.items()}
    with quiet():
        how = LoadStateDictConfig(
            device_map={"": torch.device("meta")},
            dtype=torch.float32,
            weight_mapping=get_model_conversion_mapping(model),
        )
        info, _ = convert_and_load_state_dict_in_model(model=model, state_dict=state, load_config=how)
        model.mark_tied_weights_as_initialized(info)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    refuse_missing(path, model, info.missing_keys, info.unexpected_keys)
    for name, there, wanted in sorted(info.mismatched_keys):
        found, fix = f"{name} {list(there)}", "use weights and config.json of the same model"
        raise InputError("E411", "weights do not fit", path, found, f"{list(wanted)} by config.json", fix)
    unused = sorted(name for name in info.unexpected_keys if tensors.get(name, {}).get("shape") != [])
    if not unused:  # Single numbers are constants of older versions.
        return []
    some = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
    return [
        f"warning[W411] weights not used — {path}. Found {len(unused)} that {type(model).__name__} does not have ({some})"
    ]


def rehearse_save(path: str, model: Any) -> list[str]:
    """Write all of ``model`` but its weights as a checkpoint does, into a folder that is removed.

    Returns warnings about settings of the folder ``path`` that are repaired. Raises ``InputError`` E413 with what the first
    checkpoint would meet.
    """
    file = Path(path) / "generation_config.json"
    if file.is_file():
        model.generation_config = _generation(file)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            changed = make_savable(model)
            write_settings(model, folder)
    except Exception as error:  # Whatever a library raises at the save.
        expected, fix = "a model that transformers can save", "correct the file that it names"
        raise InputError("E413", "cannot be saved", path, one_line(error), expected, fix) from None
    where = file if file.is_file() else file.with_name("config.json")
    return [f"warning[W413] inconsistent settings for generation — {where}. Checkpoints get {what}" for what in changed]


def _generation(file: Path) -> GenerationConfig:
    """Return the settings for generation in ``file``. Raises ``InputError`` E401 if transformers refuses to load them."""
    try:
        with quiet():
            return GenerationConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except Exception as error:  # Its checks raise whatever they like.
        expected, fix = "settings that transformers accepts", "correct the file, or remove it"
        raise InputError("E401", "model not readable", str(file), one_line(error), expected, fix) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's advice and progress bars from the terminal: what matters is told in its own words."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
