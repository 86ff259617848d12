"""Models that are loaded in shares at ZeRO-3: bit for bit those of transformers, a layer at a time, and saved the same way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from learner import saving
from learner.tensor_files import Described, write_tensors
from tests.learner_groups import learner_config
from tests.tiny_models import ATTENTION_ALONE, HYBRID, write_tiny_model

DTYPES = ["float32", "bfloat16"]
NAMES = [*ATTENTION_ALONE, *HYBRID]


@pytest.fixture(scope="module")
def loaded(ranks_of, tmp_path_factory):
    """A folder of models, one of them without a weight, after two ranks have loaded and saved each; what each rank held."""
    folder = tmp_path_factory.mktemp("shares")
    for name in NAMES:
        write_tiny_model(name, folder / name)
    lacking = write_tiny_model("Llama", folder / "lacking")
    weights = load_file(lacking / "model.safetensors")
    weights["model.layers.1.renamed.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, lacking / "model.safetensors")
    models = [[str(folder / name), dtype] for name in [*NAMES, "lacking"] for dtype in DTYPES]
    config = learner_config(folder / "Llama", 2, zero_stage=3)
    ranks_of(2).run("load", {"config": config, "models": models, "out": str(folder / "held")})
    return folder, [json.loads((folder / f"held-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.stack
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_buffers_are_those_of_transformers_bit_for_bit(loaded, name, dtype):
    folder, held = loaded
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=getattr(torch, dtype))
    expected = dict(model.named_parameters()) | {f"buffer {key}": value for key, value in model.named_buffers()}
    found = torch.load(folder / f"{name}-{dtype}.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)
    sizes = {key: value.numel() * value.element_size() for key, value in model.named_parameters()}
    layers: dict[str, int] = {}
    for key, size in sizes.items():
        number = next((part for part in key.split(".") if part.isdigit()), key.rpartition(".")[0])
        layers[number] = layers.get(number, 0) + size
    for rank in held:
        most, share = rank[f"{folder / name} {dtype}"]
        assert 0 < most <= max(layers.values())
        assert share <= sum(sizes.values()) / 2 + 16 * len(sizes)


@pytest.mark.stack
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_layer_by_layer_is_what_transformers_saves(loaded, tmp_path, name, dtype):
    folder, _ = loaded
    AutoModelForCausalLM.from_pretrained(folder / name, dtype=getattr(torch, dtype)).save_pretrained(tmp_path)
    saved = folder / f"{name}-{dtype}-saved"
    expected, found = (load_file(place / "model.safetensors") for place in (tmp_path, saved))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert {file.name for file in saved.iterdir()} == {file.name for file in tmp_path.iterdir()}


@pytest.mark.stack
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_with_another_name_are_refused_on_every_rank(loaded, dtype):
    folder, held = loaded
    for rank in held:
        told = rank[f"{folder / 'lacking'} {dtype}"]
        assert "error[E411]" in told
        assert "1 missing (model.layers.1.mlp.up_proj.weight), 1 unexpected (model.layers.1.renamed.weight)" in told


def described(*tensors):
    return [Described(f"t{i}", tensor.dtype, tuple(tensor.shape)) for i, tensor in enumerate(tensors)]


def test_files_written_tensor_by_tensor_are_read_by_safetensors(tmp_path):
    tensors = [torch.arange(6.0).view(2, 3), torch.ones(3, dtype=torch.bfloat16), torch.tensor(7), torch.zeros(0, 4)]
    files = [(tmp_path / "a", described(*tensors)[:2]), (tmp_path / "sub" / "b", described(*tensors)[2:])]
    write_tensors(files, ((f"t{i}", tensor) for i, tensor in enumerate(tensors)))
    found = load_file(tmp_path / "a") | load_file(tmp_path / "sub" / "b")
    for i, tensor in enumerate(tensors):
        assert torch.equal(found[f"t{i}"], tensor)
        assert found[f"t{i}"].dtype == tensor.dtype


def test_a_full_disk_is_told_after_every_tensor_was_gathered(tmp_path):
    gathered = []

    def tensors():
        for i in range(3):
            gathered.append(i)
            yield f"t{i}", torch.zeros(1 << 20)

    with pytest.raises(OSError, match="No space left"):
        write_tensors([(tmp_path / "full", described(*[torch.zeros(1 << 20)] * 3))], _into_full(tmp_path, tensors()))
    assert gathered == [0, 1, 2]


def _into_full(folder, tensors):
    (folder / "full").symlink_to("/dev/full")
    yield from tensors


def test_a_large_model_is_split_as_transformers_splits_it(monkeypatch):
    monkeypatch.setattr(saving, "FILE_BYTES", 100)
    parts = saving._files(described(*[torch.zeros(size) for size in (10, 15, 1, 40)]))
    assert {name: [one.name for one in part] for name, part in parts.items()} == {
        "model-00001-of-00003.safetensors": ["t0", "t1"],
        "model-00002-of-00003.safetensors": ["t2"],
        "model-00003-of-00003.safetensors": ["t3"],
    }
