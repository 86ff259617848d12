"""What the tests of GPUs share: a random model of 1.5 billion parameters, and a file that keeps what was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

SIZE = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 151_936}
"""Of Qwen2.5-1.5B, with a tied head."""


@pytest.fixture(scope="session")
def big_model(tmp_path_factory) -> Path:
    """A folder with the model in bfloat16; made on the spot, nothing is fetched."""
    import torch

    from launch.builtin import TASKS, make_tokenizer, random_qwen2

    folder, tokenizer = tmp_path_factory.mktemp("big"), make_tokenizer(TASKS["addition"])
    torch.manual_seed(0)
    with torch.device("cuda"):
        random_qwen2(tokenizer, **SIZE).to(torch.bfloat16).cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def told():
    """``told(name=number, ...)`` prints what was measured, and adds it to the file that MILLRACE_MEASURED names."""

    def tell(**measured: float) -> None:
        line = json.dumps({name: round(float(value), 4) for name, value in measured.items()})
        print(line, flush=True)
        if file := os.environ.get("MILLRACE_MEASURED"):
            with Path(file).open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    return tell


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, fail at once for ``make test-gpu``, and skip these tests among others."""
    import torch

    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    if not ours or torch.cuda.is_available():
        return
    if os.environ.get("MILLRACE_TEST_GPU"):
        pytest.exit("error[E501] no GPU — tests/gpu. Found none that torch sees, expected at least one", returncode=1)
    for item in ours:
        item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))
