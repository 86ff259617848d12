"""The program of a learner rank in tests: it does one job after the other, a line of JSON each, and answers "done"."""

from __future__ import annotations

import gc
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from learner.learner import Learner
from learner.logprobs import PolicyModel
from learner.weight_sender import full_tensors
from shared.config import Config
from shared.config_algorithm import Choice
from shared.errors import InputError
from shared.weights import Segment, views
from tests.learner_groups import make_groups


def new_learner(options: dict[str, Any], **changes: Any) -> Learner:
    config = Config.model_validate(options["config"]).model_copy(update=changes)
    return Learner(config, options["rank"], options["ranks"], ("127.0.0.1", options["port"]))


def write(
    options: dict[str, Any], learner: Learner, reports: list[Any], more: dict[str, np.ndarray] | None = None
) -> None:
    """Gather the weights, which all ranks do together; rank 0 writes them, ``more`` tensors and the reports."""
    state = {name: tensor.detach().float().numpy().copy() for name, tensor in full_tensors(learner.engine)}
    if options["rank"] == 0:
        np.savez(options["out"], **state, **(more or {}))
        with open(options["out"] + ".json", "w", encoding="utf-8") as file:
            json.dump(reports, file)


def published(learner: Learner) -> dict[str, np.ndarray]:
    """The tensors of a new publication, by name; none on ranks that do not send."""
    publication = learner.publish(np.array([5, 6, 7], np.int32))
    if publication is None:
        return {}
    chunks = views(Segment(publication.segment).bytes, publication.tensors)
    return {m.name: chunk.copy().view(m.dtype).reshape(m.shape) for m, chunk in zip(publication.tensors, chunks)}


def train(options: dict[str, Any]) -> None:
    """The same groups again and again, for ``steps`` steps; publishes before and after them where a file is named."""
    learner, groups = new_learner(options), make_groups(3)
    if options.get("publish"):
        learner.open_sender(f"ranks-{options['port']}")
        published(learner)
    if options.get("equal_rewards"):
        for group in groups:
            group.rewards[:] = 1.0
    reports = [learner.train_step(groups) for _ in range(options["steps"])]
    write(options, learner, [[report.policy_version, report.applied, report.metrics] for report in reports])
    if options.get("save"):
        learner.save(options["save"])
    if options.get("publish"):
        found = published(learner)
        if options["rank"] == 0:
            np.savez(options["publish"], **found)
        learner._sender.close()


def gradients(options: dict[str, Any]) -> None:
    """Gradients of one step for each of the ``aggregations``, read off Adam's first moment."""
    found = {}
    for aggregation in options["aggregations"]:
        config = Config.model_validate(options["config"])
        algorithm = config.algorithm.model_copy(update={"aggregation": Choice.model_validate(aggregation)})
        learner = new_learner(options, algorithm=algorithm)
        learner.train_step(make_groups(3))
        names = {id(p): n.removeprefix("model.") for n, p in learner.engine.module.named_parameters()}
        scale = 1 - config.learner.betas[0]
        for parameter, state in learner.optimizer.state.items():
            found[f"{aggregation['name']}/{names[id(parameter)]}"] = (state["exp_avg"] / scale).numpy()
    if options["rank"] == 0:
        np.savez(options["out"], **found)


def resume(options: dict[str, Any]) -> None:
    """Steps ``from`` to ``to``, each on groups of its own, from a checkpoint to another if they are named."""
    learner = new_learner(options)
    if options.get("load"):
        assert learner.load(options["load"]) == options["at"]
    reports = []
    for step in range(options["from"], options["to"]):
        reports.append(learner.train_step(make_groups(step)).metrics)
        if step + 1 == options.get("save_at"):
            learner.save(options["save"])
    reference = learner.reference.tensors() if learner.reference is not None else ()
    write(options, learner, reports, {f"reference/{name}": t.float().numpy().copy() for name, t in reference})


def load(options: dict[str, Any]) -> None:
    """Load every one of ``models`` in shares: rank 0 writes whole weights, buffers, and the model as a checkpoint has it.

    The most bytes that this rank held whole at a time, and those of its shares, go into ``out``-RANK.json.
    """
    import torch

    from learner import sharded_loading
    from learner.distributed import join_group
    from learner.saving import save_weights

    held: dict[str, Any] = {}
    join_group(
        Config.model_validate(options["config"]), options["rank"], options["ranks"], ("127.0.0.1", options["port"])
    )
    plain = sharded_loading.partition
    for path, dtype in options["models"]:
        options["config"]["model"] = {"path": path, "dtype": dtype}
        most = [0]

        def counted(model: Any, settings: Any, most: list[int] = most) -> None:
            whole = [p for p in model.parameters() if not p.is_meta and not hasattr(p, "ds_id")]
            most[0] = max(most[0], sum(p.numel() * p.element_size() for p in whole))
            plain(model, settings)

        sharded_loading.partition = counted
        try:
            policy = PolicyModel.load(Config.model_validate(options["config"]))
        except InputError as problem:
            held[f"{path} {dtype}"] = str(problem)
            continue
        finally:
            sharded_loading.partition = plain
        shares = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in policy.parameters())
        held[f"{path} {dtype}"] = [most[0], shares]
        engine = SimpleNamespace(module=policy)
        weights = {name: tensor.detach().clone() for name, tensor in full_tensors(engine)}
        buffers = {f"buffer {name}": buffer for name, buffer in policy.model.named_buffers()}
        save_weights(engine, f"{path}-{dtype}-saved", options["rank"] == 0)
        if options["rank"] == 0:
            torch.save(weights | buffers, f"{path}-{dtype}.pt")
    with open(f"{options['out']}-{options['rank']}.json", "w", encoding="utf-8") as file:
        json.dump(held, file)


if __name__ == "__main__":
    JOBS = {"train": train, "gradients": gradients, "resume": resume, "load": load}
    for line in sys.stdin:
        job = json.loads(line)
        JOBS[job["job"]](job)
        gc.collect()
        print("done", flush=True)
