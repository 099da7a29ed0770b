"""Build ``alr_kernels._C``: C++ always, CUDA when nvcc is found. Metadata is in pyproject.toml.

No torch here: one wheel serves every torch version. Environment variables:

    ALR_BUILD_CUDA     0: skip CUDA; 1: fail without it; unset: build it when nvcc is found and works
    ALR_LOCAL_VERSION  what follows the + in the version, to tell flavours of a wheel apart; auto (with
                       ALR_BUILD_CUDA): cu130 for CUDA 13.0, nothing without CUDA; unset: nothing
    CUDA_HOME          where bin/nvcc is, when it is not on PATH
    CXX, CXXFLAGS, LDFLAGS, NVCCFLAGS   as usual; MAX_JOBS limits parallel compilations
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Contraction off and no fast maths: every backend repeats the reference bit for bit.
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
CXX_FLAGS += ["-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC", "--threads", "2"]

# Each instruction set gets its own copy of the loops; csrc/cpu.cpp chooses when it runs.
CAPABILITIES = {"default": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
CAPABILITIES["avx512"] = [*CAPABILITIES["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CAPABILITY_SOURCES = ["finalise_cpu.cpp", "importance_cpu.cpp"]
STEP_SOURCE = "step_cpu.cpp"  # once more with contraction into fused multiply-adds, for precise=False
STEP_VARIANTS = {"precise": ["-DALR_PRECISE=1"], "fast": ["-DALR_PRECISE=0", "-ffp-contract=fast"]}
CONTRACTED_SOURCES = ["fisher_cpu.cpp", "lora_cpu.cpp"]  # matrix products: held to a tolerance, not to bits
CUDA_SOURCES = ["importance_cuda.cu", "finalise_cuda.cu", "fisher_cuda.cu"]
CONTRACTED_CUDA_SOURCES = {"fisher_cuda.cu"}
CUDA_ARCHITECTURES = ["75", "80", "90", "100", "120"]  # cubins; PTX of the newest for what comes after


class BuildError(SystemExit):
    """A build that cannot go on, with what to do about it."""


class Cuda(NamedTuple):
    """The CUDA half of the build: a compiler, or why there is none."""

    nvcc: str = ""
    toolkit: str = ""
    cudart: str = ""  # libcudart_static.a
    architectures: tuple[str, ...] = ()
    missing: str = ""


def run(command: list[str]) -> str | None:
    """Return the output of ``command``, or None when it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout if result.returncode == 0 else None


def find_compiler() -> list[str]:
    """Return the C++ compiler as a command: $CXX, or the first of c++, g++ and clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if run([*shlex.split(name), "--version"]) is not None:
            return shlex.split(name)
    raise BuildError(
        f"alr-kernels needs a C++17 compiler (GCC or Clang); tried {', '.join(names)}. "
        "Install one (Debian: apt install g++; macOS: xcode-select --install) or set CXX."
    )


def python_headers() -> str:
    """Return the folder that holds Python.h."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise BuildError(
            f"alr-kernels needs Python's headers; there is no Python.h in {folder}. "
            "Install them (Debian: apt install python3-dev)."
        )
    return str(folder)


def openmp_flags(cxx: list[str]) -> list[str]:
    """Return flags for OpenMP when it compiles and links, else for its simd pragmas alone."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        if run([*cxx, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]) is not None:
            return ["-fopenmp"]
    return ["-fopenmp-simd"]


def find_nvcc() -> str:
    """Return the path of nvcc from CUDA_HOME (when set) or PATH, or an empty string."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or ""


def find_cudart(nvcc: str) -> str:
    """Return the path of libcudart_static.a in the folders nvcc links from, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.touch()
        plan = subprocess.run([nvcc, "-dryrun", str(source)], capture_output=True, text=True, check=False).stderr
    folders = [Path(p) for p in re.findall(r'"-L([^"]+)"', plan)]
    folders += [Path(top) / lib for top in re.findall(r"#\$ TOP=(.+)", plan) for lib in ("lib64", "lib")]
    found = (f / "libcudart_static.a" for f in folders)
    return next((str(f.resolve()) for f in found if f.is_file()), "")


def find_cuda() -> Cuda:
    """Return what to build for CUDA, following ALR_BUILD_CUDA."""
    wanted = os.environ.get("ALR_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"ALR_BUILD_CUDA: expected 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return Cuda(missing="ALR_BUILD_CUDA=0")
    nvcc = find_nvcc()
    if not nvcc:
        if wanted == "1":
            raise BuildError("ALR_BUILD_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH: set CUDA_HOME")
        return Cuda(missing="nvcc not found at build")
    toolkit = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]) or "")
    known = re.findall(r"sm_(\d+)", run([nvcc, "--list-gpu-code"]) or "")
    architectures = tuple(a for a in CUDA_ARCHITECTURES if a in known)
    cudart = find_cudart(nvcc)
    if toolkit and architectures and cudart:
        return Cuda(nvcc, toolkit.group(1), cudart, architectures)
    reason = f"{nvcc} does not work, is older than CUDA 11.7 or has no libcudart_static.a"
    if wanted == "1":
        raise BuildError(f"ALR_BUILD_CUDA=1, but {reason}")
    return Cuda(missing=reason)


def version() -> str:
    """Return the version of the metadata: the package's own, with a local part as ALR_LOCAL_VERSION asks for."""
    public = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "alr_kernels" / "_version.py").read_text(), re.MULTILINE)
    if public is None:
        raise BuildError('alr_kernels/_version.py: expected a line __version__ = "..."')
    local = os.environ.get("ALR_LOCAL_VERSION", "")
    if local == "auto":
        if os.environ.get("ALR_BUILD_CUDA") not in ("0", "1"):
            raise BuildError("ALR_LOCAL_VERSION=auto names what is built: set ALR_BUILD_CUDA to 0 or 1 with it")
        toolkit = find_cuda().toolkit
        local = "cu" + toolkit.replace(".", "") if toolkit else ""
    if local and not re.fullmatch(r"[A-Za-z0-9]+(\.[A-Za-z0-9]+)*", local):
        raise BuildError(f"ALR_LOCAL_VERSION: expected auto, or letters, digits and dots such as cu130, got {local!r}")
    return f"{public.group(1)}+{local}" if local else public.group(1)


def write_if_changed(path: Path, text: str) -> None:
    """Write ``text`` unless the file holds it already, so that ninja sees no change."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def copied_pybind11(build: Path) -> Path:
    """Return a copy of pybind11's headers: build isolation has them at a new path each time."""
    import pybind11

    target = build / f"pybind11-{pybind11.__version__}"
    if not target.exists():
        partial = Path(tempfile.mkdtemp(dir=build))
        shutil.copytree(pybind11.get_include(), partial, dirs_exist_ok=True)
        partial.rename(target)
    return target


def find_ninja() -> str:
    """Return the path of ninja, from its wheel or PATH."""
    try:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        path = None
    path = path or shutil.which("ninja")
    if not path:
        raise BuildError("alr-kernels builds with ninja: pip install ninja")
    return path


def escape(path: Path | str) -> str:
    """Return ``path`` as ninja writes it in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class NinjaFile:
    """The text of a build.ninja: three rules and one line a target."""

    def __init__(self, cxx: list[str], cuda: Cuda) -> None:
        self.objects: list[str] = []
        self.lines = ["ninja_required_version = 1.5"]
        self._rule("cxx", shlex.join(cxx) + " -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
        self._rule("link", shlex.join(cxx) + " -o $out $in $flags")
        if cuda.nvcc:
            self._rule("nvcc", shlex.join([cuda.nvcc]) + " -MMD -MF $out.d $flags -c $in -o $out", depfile=True)

    def _rule(self, name: str, command: str, *, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  deps = gcc", "  depfile = $out.d"]

    def add(self, rule: str, target: Path | str, sources: list[Path] | list[str], flags: list[str]) -> None:
        """Add one target; compiled objects are remembered for the link."""
        if rule != "link":
            self.objects.append(str(target))
        quoted = shlex.join(flags).replace("$", "$$")
        self.lines += [f"build {escape(target)}: {rule} {' '.join(map(escape, sources))}", f"  flags = {quoted}"]

    def text(self) -> str:
        """Return the file."""
        return "\n".join(self.lines) + "\n"


class NinjaBuildExt(build_ext):
    """build_ext that writes a build.ninja and runs it; rebuilds compile only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext`` with CUDA when possible, else (unless forced) without, saying so."""
        # Not self.build_temp: an editable install gets a new one each time, and would rebuild all.
        build = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx, ninja, cuda = find_compiler(), find_ninja(), find_cuda()
        openmp = openmp_flags(cxx)
        # With CUDA uncertain, -k 0 compiles all else while nvcc fails, and the retry finds it done.
        uncertain = bool(cuda.nvcc) and os.environ.get("ALR_BUILD_CUDA") != "1"
        self._configure(build, target, cxx, openmp, cuda)
        status = self._ninja(ninja, build, ["-k", "0"] if uncertain else [])
        if status and uncertain:
            cuda = Cuda(missing=f"{cuda.nvcc} failed at build")
            self._configure(build, target, cxx, openmp, cuda)
            status = self._ninja(ninja, build, [])
            if not status:
                warnings.warn(
                    "alr-kernels was built WITHOUT CUDA, because nvcc failed (its errors are above). "
                    "ALR_BUILD_CUDA=1 makes this an error, ALR_BUILD_CUDA=0 skips CUDA.",
                    stacklevel=1,
                )
        if status:
            raise BuildError("alr-kernels: compiling alr_kernels._C failed; the compiler's messages are above")

    def _ninja(self, ninja: str, build: Path, options: list[str]) -> int:
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        return subprocess.call([ninja, "-C", str(build), *jobs, *options])

    def _configure(self, build: Path, target: Path, cxx: list[str], openmp: list[str], cuda: Cuda) -> None:
        """Write build.ninja and build_config.h into ``build``."""
        quoted = cuda.missing.replace("\\", "\\\\").replace('"', '\\"')
        write_if_changed(
            build / "include" / "build_config.h",
            "// Written by setup.py.\n#pragma once\n"
            f"#define ALR_CUDA_BUILD {int(bool(cuda.nvcc))}\n"
            f'#define ALR_CUDA_TOOLKIT "{cuda.toolkit}"\n'
            f'#define ALR_CUDA_ARCHITECTURES "{" ".join("sm_" + a for a in cuda.architectures)}"\n'
            f'#define ALR_CUDA_MISSING "{quoted}"\n',
        )
        x86 = "#define __x86_64__ 1" in (run([*cxx, "-dM", "-E", "-x", "c++", os.devnull]) or "")
        flags = [*CXX_FLAGS, *openmp, *(["-DALR_CPU_X86"] if x86 else []), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        file = NinjaFile(cxx, cuda)
        source = ROOT / "csrc"
        for name, instructions in CAPABILITIES.items():
            if not instructions or x86:
                for stem in CAPABILITY_SOURCES:
                    own = [*flags, *instructions, f"-DALR_CPU_NAMESPACE=cpu_{name}"]
                    file.add("cxx", f"{stem}.{name}.o", [source / stem], own)
                for stem in CONTRACTED_SOURCES:
                    file.add("cxx", f"{stem}.{name}.o", [source / stem], [*own, "-ffp-contract=fast"])
                for variant, extra in STEP_VARIANTS.items():
                    file.add("cxx", f"{STEP_SOURCE}.{name}.{variant}.o", [source / STEP_SOURCE], [*own, *extra])
        for stem in ("cpu.cpp", "fisher.cpp", "lora.cpp"):
            file.add("cxx", f"{stem}.o", [source / stem], flags)
        includes = [
            f"-I{build / 'include'}",
            "-isystem", str(copied_pybind11(build)),
            "-isystem", python_headers(),
        ]  # fmt: skip
        for stem in ("module.cpp", "fisher_module.cpp", "lora_module.cpp"):
            file.add("cxx", f"{stem}.o", [source / stem], [*flags, *includes])
        if cuda.nvcc:
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cuda.architectures]
            newest = cuda.architectures[-1]
            targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
            own = [*NVCC_FLAGS, *targets, *shlex.split(os.environ.get("NVCCFLAGS", ""))]
            for stem in CUDA_SOURCES:
                contraction = "--fmad=true" if stem in CONTRACTED_CUDA_SOURCES else "--fmad=false"
                file.add("nvcc", f"{stem}.o", [source / stem], [*own, contraction])
        file.add("link", target, file.objects, self._link_flags(openmp, cuda))
        write_if_changed(build / "build.ninja", file.text())

    def _link_flags(self, openmp: list[str], cuda: Cuda) -> list[str]:
        """Return flags of the final link.

        libgomp stays a library of its own, needed by its plain name: the loader then takes the one that torch brought
        and loaded before (import torch comes first everywhere), and both share its threads.
        """
        runtime = [cuda.cudart, "-ldl", "-lrt", "-lpthread"] if cuda.nvcc else []
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        parallel = openmp if openmp == ["-fopenmp"] else []
        return [*shared, *runtime, *parallel, *shlex.split(os.environ.get("LDFLAGS", ""))]


# Sources and headers are named for the sdist; what is compiled how is in NinjaBuildExt.
sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.c*"))]
headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.h"))]
extension = Extension("alr_kernels._C", sources=sources, depends=headers)
setup(version=version(), ext_modules=[extension], cmdclass={"build_ext": NinjaBuildExt})
