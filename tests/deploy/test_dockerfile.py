"""The image: lint-clean, never root, any base, code after dependencies, nothing unlisted in the context."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return (INSTRUCTION, argument) in order, without comments, continuation lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name.upper(), " ".join(argument.split())) for name, argument in pairs]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(hadolint), "--no-color", str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp && sudo true\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(bad)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1


def test_the_base_image_is_an_argument_and_every_stage_comes_from_it() -> None:
    found = instructions()
    assert found[0] == ("ARG", "BASE_IMAGE=python:3.11-slim")
    stages = set()
    for name, argument in found:
        if name != "FROM":
            continue
        source = argument.split()[0]
        assert source == "${BASE_IMAGE}" or source in stages
        stages.update(re.findall(r" AS (\w+)", argument))


def test_the_image_ends_as_a_numeric_user_other_than_root_and_uid_of_the_manifests() -> None:
    users = [argument for name, argument in last_stage() if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    deployment = next(
        document
        for document in yaml.safe_load_all((ROOT / "deploy" / "control-plane.yaml").read_text())
        if document["kind"] == "Deployment"
    )
    security = deployment["spec"]["template"]["spec"]["securityContext"]
    assert users[-1] == f"{security['runAsUser']}:{security['runAsGroup']}"


def test_the_image_says_whether_it_is_healthy() -> None:
    (check,) = (argument for name, argument in last_stage() if name == "HEALTHCHECK")
    assert "/healthz" in check


def test_code_is_copied_after_the_dependencies_are_installed() -> None:
    found = instructions()
    install = next(
        i for i, (name, argument) in enumerate(found) if name == "RUN" and "pip install" in argument
    )
    copies = [
        i
        for i, (name, argument) in enumerate(found)
        if name == "COPY" and argument.split()[0] != "pyproject.toml"
    ]
    assert install < min(copies)


def test_no_stage_bakes_in_a_secret_or_copies_everything() -> None:
    for name, argument in instructions():
        if name in ("ENV", "ARG"):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", argument)
        if name in ("COPY", "ADD"):
            assert argument.split()[-2] not in (".", "./", "*")


def test_the_build_context_lists_what_may_enter() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {pattern.rstrip("*") for pattern in packages["include"]} <= allowed
    copied = {
        source
        for name, argument in instructions()
        if name == "COPY" and not argument.startswith("--from")
        for source in argument.split()[:-1]
    }
    assert copied == allowed
