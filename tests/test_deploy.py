"""`deploy/`: what can be checked without Docker, a cluster or root."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.utilities.templating import apply_values

from ddpo_workflow.flows.server.deploy import POOLS

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "deploy"
UNITS = sorted(path.name for path in (DEPLOY / "systemd").iterdir())


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [linter, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.stdout + done.stderr == ""


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert sorted(sources) == sorted(kept)
    assert all((REPOSITORY / source).exists() for source in sources)


def test_the_image_has_all_that_the_deployments_name() -> None:
    """A deployment's code, the default of its form and what the package needs to be installed."""
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    listed = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    named = [each["entrypoint"].partition(":")[0] for each in listed]
    needed = [*named, "configs/starter.yaml", "prefect.yaml", "pyproject.toml", "README.md"]
    for path in needed:
        assert any(fnmatch.fnmatch(path, each) or path.startswith(f"{each}/") for each in kept)


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_compose_file_is_one_by_its_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    names = compose_spec.PyCompose.from_json(json.dumps(compose())).service_names()
    assert sorted(names) == sorted(compose()["services"])


def test_the_compose_file_starts_what_the_command_starts() -> None:
    services = compose()["services"]
    assert {"postgres", "prefect", "mlflow", "store", "deploy"} <= services.keys()
    commands = [each.get("command", ()) for each in services.values()]
    assert {command[-1] for command in commands if "worker" in command} == POOLS.keys()
    gpu = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    # Every name is one that is defined, and nothing is served to other machines.
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= services.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert volumes <= compose()["volumes"].keys(), name
    text = (DEPLOY / "compose.yaml").read_text()
    wanted = set(re.findall(r"\$\{(\w+)", text))
    assert wanted == set(re.findall(r"^(\w+)=", (DEPLOY / "example.env").read_text(), re.MULTILINE))
    stages = re.findall(r" AS (\w+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert {each["build"]["target"] for each in services.values() if "build" in each} == {*stages}


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_units(name: str, tmp_path: Path) -> None:
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "systemd" / name).read_text()
    programs = {Path(word) for word in re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)}
    for program in programs:
        here = Path(sys.executable).with_name(program.name)
        assert here.exists()
        text = text.replace(str(program), str(here))
    # systemd asks for an instance of a template, such as x@y.service.
    unit = tmp_path / name.replace("@.", "@ddpo-gpu.")
    unit.write_text(text)
    done = subprocess.run([verifier, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def template() -> dict[str, Any]:
    return json.loads((DEPLOY / "kubernetes" / "ddpo-gpu.json").read_text())


def defaults() -> dict[str, Any]:
    properties = template()["variables"]["properties"]
    return {name: each["default"] for name, each in properties.items() if "default" in each}


def test_a_pod_of_the_kubernetes_template_requests_its_gpus() -> None:
    values = defaults() | {"gpus": 2, "env": {"DDPO_ROOT": "s3://ddpo/store"}, "command": "run"}
    manifest = apply_values(template()["job_configuration"]["job_manifest"], values)
    assert isinstance(manifest, dict)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["name"] == "prefect-job"  # the name that Prefect's worker demands
    assert container["image"] == "ddpo:cuda" and container["workingDir"] == "/opt/ddpo"
    assert pod["restartPolicy"] == "Never"
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template()["job_configuration"])))
    assert used == template()["variables"]["properties"].keys()


def test_the_defaults_of_the_kubernetes_template_fit_its_own_form() -> None:
    schema = template()["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(defaults(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(defaults() | {"gpus": -1}, schema)


@pytest.mark.slow
def test_prefects_own_worker_makes_a_job_of_the_kubernetes_template() -> None:
    worker = pytest.importorskip(
        "prefect_kubernetes.worker", reason="prefect-kubernetes is not installed"
    )
    made = asyncio.run(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(
            base_job_template=template(), values={"gpus": 1, "env": {"A": "b"}}
        )
    )
    (container,) = made.job_manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert made.namespace == "ddpo"
