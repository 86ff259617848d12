"""The files in launch/deploy: what they name exists, and they fit each other, the code, Ray and KubeRay."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from launch.cli import VERBS
from launch.cluster import Needs
from launch.keeper import INTERRUPT_LIMIT_S
from launch.run import parser
from shared.config_loader import known_keys, load_config

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "launch" / "deploy"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(DEPLOY.iterdir())}
JOB, POLICY = yaml.safe_load_all(TEXTS["rayjob.yaml"])
CLUSTER = JOB["spec"]["rayClusterSpec"]
GROUPS = {"head": CLUSTER["headGroupSpec"], "gpu": CLUSTER["workerGroupSpecs"][0]}
PODS = {name: group["template"]["spec"] for name, group in GROUPS.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
each_pod = pytest.mark.parametrize("name", PODS)


def logical_lines(text: str) -> list[str]:
    """Lines of a shell script, a Dockerfile or a document, joined where they end in a backslash."""
    return re.sub(r"\s*\\\n", " ", text).splitlines()


def shell_blocks(text: str) -> dict[str, str]:
    """The bash blocks of a Markdown document by the heading above them."""
    return {
        part.split("\n", 1)[0]: "\n".join(re.findall(r"```bash\n(.*?)```", part, re.S)) for part in text.split("\n## ")
    }


def test_these_are_the_files():
    assert set(TEXTS) == {"Dockerfile", "bare-metal.md", "rayjob.yaml", "slurm.sh"}
    assert max(len(line) for text in TEXTS.values() for line in text.splitlines()) <= 120


# --- what they name exists ---


def after(mark: str, name: str) -> str:
    """What follows ``mark`` in the first line of a file that has it."""
    return next(line for line in logical_lines(TEXTS[name]) if mark in line).split(mark)[1]


ENTRY = "python launch/run.py "
RUNS = {
    "rayjob.yaml": JOB["spec"]["entrypoint"],
    "slurm.sh, as shown": ENTRY + after("sbatch launch/deploy/slurm.sh ", "slurm.sh"),
    "slurm.sh, by itself": ENTRY + after("(($#)) || set -- ", "slurm.sh"),
    "bare-metal.md": ENTRY + after(f"-- {ENTRY}", "bare-metal.md"),
    "Dockerfile": ENTRY + after(f"millrace:cpu {ENTRY}", "Dockerfile"),
}


@pytest.mark.parametrize("where", RUNS)
def test_a_run_that_is_shown_is_accepted(where):
    program, entry, *arguments = shlex.split(RUNS[where])
    assert (program, entry) == ("python", "launch/run.py")
    load_config(*parser().parse_config(arguments)[1:])


@pytest.mark.parametrize("name", TEXTS)
def test_paths_settings_and_variables_exist(name):
    text = TEXTS[name]
    for path in re.findall(r"(?<![\w/.-])(?:launch|learner|rollout|shared|tests|requirements)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    assert set(re.findall(r"--([a-z]+\.[a-z_]+)", text)) <= set(known_keys())
    assert set(re.findall(r"^millrace (\w+)", text, re.M)) <= set(VERBS)
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "launch").rglob("*.py"))
    assert [variable for variable in re.findall(r"MILLRACE_[A-Z_]+", text) if f'"{variable}"' not in sources] == []


@pytest.mark.parametrize("name", TEXTS)
def test_ray_knows_its_commands_and_variables(name):
    from ray._private import ray_constants
    from ray.scripts.scripts import cli

    found = 0
    for line in logical_lines(TEXTS[name]):
        if line.startswith("#") or "`" in line:
            continue
        for command in re.findall(r"\bray ((?:job )?[a-z]+\b[^;&|)\"]*)", line.partition(" #")[0]):
            words = shlex.split(command.partition(" -- ")[0].split(" '")[0].replace("'", ""))
            click = cli.commands["job"].commands[words[1]] if words[0] == "job" else cli.commands[words[0]]
            known = {option for parameter in click.params for option in parameter.opts}
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line
            found += 1
    assert found or name in ("Dockerfile", "rayjob.yaml")
    for variable in re.findall(r"RAY_GRACEFUL_[A-Z_]+", TEXTS[name]):
        assert hasattr(ray_constants, variable)
    for group in GROUPS.values():
        options = {option for parameter in cli.commands["start"].params for option in parameter.opts}
        assert {f"--{key}" for key in group["rayStartParams"]} <= options


def test_no_ray_is_left_open():
    for name in ("bare-metal.md", "slurm.sh"):
        text = TEXTS[name]
        assert text.index("umask 077") < text.index("ray start --head")
        assert text.index("RAY_AUTH_MODE=token") < text.index("ray start --head")
        for line in logical_lines(text):
            if "ray start --head" in line:
                assert "--dashboard-host=127.0.0.1" in line or "--include-dashboard=false" in line
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert "0.0.0.0" not in "".join(TEXTS.values())


# --- Kubernetes ---

# Fields of KubeRay's v1 API at each level, without those that nobody here needs.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        *("entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"),
        *(
            "rayClusterSpec",
            "activeDeadlineSeconds",
            "submissionMode",
            "submitterPodTemplate",
            "submitterConfig",
            "suspend",
        ),
    },
    "cluster": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "suspend"},
    "head": {"rayStartParams", "template", "serviceType", "headService", "resources", "labels"},
    "gpu": {"rayStartParams", "template", "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts"},
}


def test_the_job_has_only_fields_that_kuberay_has():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    levels = {"": JOB, "spec": JOB["spec"], "cluster": CLUSTER, **GROUPS}
    assert {level: set(found) - FIELDS[level] for level, found in levels.items()} == {level: set() for level in levels}
    for group in GROUPS.values():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_a_job_that_fails_is_tried_again_where_it_was_and_leaves_nothing():
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    config = load_config(*parser().parse_config(shlex.split(spec["entrypoint"])[2:])[1:])
    assert config.run.resume == "auto"
    assert "ReadWriteMany" in TEXTS["rayjob.yaml"]
    assert "kind: PersistentVolumeClaim" not in TEXTS["rayjob.yaml"]


def test_the_cluster_fits_ray_and_the_run():
    assert f"ray[default]=={CLUSTER['rayVersion']}" in PROJECT["dependencies"]
    needs = Needs.of(load_config(*parser().parse_config(shlex.split(JOB["spec"]["entrypoint"])[2:])[1:]), on_gpu=True)
    limits = PODS["gpu"]["containers"][0]["resources"]["limits"]
    replicas = GROUPS["gpu"]["replicas"]
    assert limits["nvidia.com/gpu"] == 8
    assert needs.total("GPU") <= replicas * limits["nvidia.com/gpu"]
    assert needs.total("CPU") <= replicas * int(limits["cpu"])
    assert GROUPS["head"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert "nvidia.com/gpu" not in PODS["head"]["containers"][0]["resources"]["limits"]


@each_pod
def test_a_pod_has_shared_memory_and_the_shared_volume(name):
    pod = PODS[name]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    memory = mounts["/dev/shm"]["emptyDir"]
    assert memory["medium"] == "Memory"
    assert int(memory["sizeLimit"].removesuffix("Gi")) < int(
        container["resources"]["limits"]["memory"].removesuffix("Gi")
    )
    assert mounts["/millrace"]["persistentVolumeClaim"]["claimName"] == "millrace"
    config = load_config(*parser().parse_config(shlex.split(JOB["spec"]["entrypoint"])[2:])[1:])
    variables = yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"]
    places = [
        config.run.output_dir,
        *(source.path for source in [*config.data.train, *(config.data.eval or [])]),
        variables["HF_HOME"],
        variables["MILLRACE_CACHE"],
    ]
    assert all(place.startswith("/millrace/") for place in places)


@each_pod
def test_a_pod_runs_as_the_user_of_the_image(name):
    users = re.findall(r"^USER (.*)$", TEXTS["Dockerfile"], re.M)
    context = PODS[name]["securityContext"]
    assert context["runAsNonRoot"] is True
    assert {str(context["runAsUser"]), str(context["fsGroup"])} == set(users)


def test_ray_takes_the_environment_of_the_job():
    from ray.runtime_env import RuntimeEnv

    assert set(RuntimeEnv(**yaml.safe_load(JOB["spec"]["runtimeEnvYAML"]))) == {"env_vars"}


def test_the_end_of_the_head_reaches_the_driver_and_not_its_shell():
    shell, option, script = PODS["head"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    (pattern,) = set(re.findall(r'-f "(.*?)"', script))
    entrypoint = JOB["spec"]["entrypoint"]
    assert re.search(pattern, entrypoint)
    # Ray starts it through a shell, whose end would be taken for the driver's; the hook is a process too.
    assert not re.search(pattern, f"/bin/sh -c {entrypoint}")
    assert not re.search(pattern, f"{shell} {option} {script}")
    drain = next(e["value"] for e in PODS["head"]["containers"][0]["env"] if "DRAIN" in e["name"])
    assert INTERRUPT_LIMIT_S + float(drain) < PODS["head"]["terminationGracePeriodSeconds"]


def test_only_the_pods_of_the_job_the_submitter_and_the_operator_get_in():
    spec = POLICY["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    for group in GROUPS.values():
        assert spec["podSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    own, dashboard = spec["ingress"]
    assert own == {"from": [{"podSelector": spec["podSelector"]}]}
    assert dashboard["ports"] == [{"port": 8265}]
    submitter, operator = dashboard["from"]
    assert submitter["podSelector"]["matchLabels"] == {"job-name": JOB["metadata"]["name"]}
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}


# --- the image ---


def stages() -> dict[str, list[str]]:
    """The instructions of each stage of the Dockerfile, after those of the stage that it is made from."""
    found: dict[str, list[str]] = {}
    text = "\n".join(line for line in TEXTS["Dockerfile"].splitlines() if not line.lstrip().startswith("#"))
    for line in filter(None, logical_lines(text)):
        if line.startswith("FROM "):
            _, source, _, name = line.split()
            found[name] = list(found.get(source, [line]))
        else:
            found[name].append(line)
    return found


def test_the_stages_are_those_that_are_shown():
    assert list(stages()) == ["base", "cpu", "gpu"]
    shown = [line for line in TEXTS["Dockerfile"].splitlines() if "docker build" in line]
    assert [re.findall(r"--target (\S+)", line) for line in shown] == [[], ["cpu"]]
    assert all("-f launch/deploy/Dockerfile " in line and line.endswith(" .") for line in shown)
    assert all(lines[0].startswith("FROM python:3.11-slim-") for lines in stages().values())


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_holds_the_packages_and_runs_as_nobody_special(stage):
    lines = stages()[stage]
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {name.partition(".")[0] for name in named}
    assert packages | {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    made = next(line for line in lines if line.startswith("RUN mkdir ")).split()[2:]
    assert sorted(made) == sorted(packages)
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 1000"]
    assert f"--uid {users[0].split()[1]} " in next(line for line in lines if "useradd" in line)
    tail = lines[lines.index(users[0]) + 1 :]
    assert all("pip install" not in line for line in tail)
    system = next(line for line in lines if "apt-get install" in line).split()
    assert {"bubblewrap", "g++", "libnuma1", "procps", "wget"} <= set(system)


def test_the_cpu_image_is_installed_as_by_make():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    torch = re.search(r"^TORCH := (.*)$", makefile, re.M).group(1)
    index = re.search(r"--index-url (\S+)", makefile).group(1)
    (libraries,) = [line for line in stages()["cpu"] if "cpu.lock" in line and line.startswith("RUN ")]
    assert f"pip install --no-deps --index-url {index} {torch} " in libraries
    assert torch in (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()
    assert libraries.count("--no-deps") == libraries.count("pip install")
    assert "RUN pip install --no-deps --no-build-isolation --editable ." in stages()["cpu"]


def test_the_gpu_image_has_the_extra():
    lines = stages()["gpu"]
    assert lines.index("RUN pip install .[gpu]") < lines.index("RUN pip install --no-deps --editable .")
    assert any(requirement.startswith("vllm==") for requirement in PROJECT["optional-dependencies"]["gpu"])


@pytest.mark.process
def test_make_test_gpu_fails_in_one_line_where_there_is_no_gpu(tmp_path):
    """It neither installs nor skips; ``PATH`` holds no nvidia-smi."""
    names = ("grep", "sh", "bash", "env")
    for name in names:
        (tmp_path / name).symlink_to(shutil.which(name))
    command = [shutil.which("make"), "test-gpu", f"VENV_GPU={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    told = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    assert len(told) == 1
    assert told[0].startswith("error[E501] no GPU — make test-gpu. Found none that nvidia-smi lists")
    assert not (tmp_path / "venv").exists()


def test_the_gpu_lock_has_the_pinned_packages():
    lock = (ROOT / "requirements" / "gpu.lock").read_text(encoding="utf-8").splitlines()
    pinned = [one for one in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gpu"] if "==" in one]
    assert all(re.sub(r"\[.*\]", "", one) in lock for one in pinned)
    assert "+cpu" not in "".join(lock)
