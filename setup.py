"""Builds lct_fast._C with ninja. Needs a C++17 compiler and pybind11; not torch, not a GPU, not the network.

Environment:
    CXX              the C++ compiler (default: g++, else c++)
    LCT_CUDA         0 leaves the CUDA kernels out; 1 makes a missing nvcc an error. Default: build them
                     where nvcc is on the PATH or under CUDA_HOME.
    LCT_CUDA_ARCHS   comma-separated compute capabilities, "+PTX" appended for PTX instead of machine code.
                     Default: those of "80,90a,100,80+PTX" that this nvcc knows.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80,90a,100,80+PTX"

# Every csrc/cpu/*_simd.cpp is compiled once for each of these and picked at run time; no other file may use
# these instructions, so that the module loads on any CPU.
X86_LEVELS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
# Every csrc/cpu/*_vnni.cpp is compiled once, for the level avx512vnni: avx512 in all else.
X86_VNNI = [*X86_LEVELS["avx512"], "-mavx512vnni"]
# perturb promises the same bits at every level, so no product there meets its sum in one instruction. Nobody looks at
# errno or the exceptions of its roots and quotients, which would keep them from becoming vectors.
EXACT = {"perturb_simd": ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]}
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wno-unknown-pragmas"]
# GCC 12 takes the undefined registers in its own AVX-512 headers for uninitialized ones (its PR 105593).
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def compiler() -> str:
    named = os.environ.get("CXX")
    if named:
        return named
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return name
    raise SystemExit(
        "lct-fast needs a C++17 compiler, found none of g++, c++, clang++; install one or set CXX"
    )


def find_nvcc() -> Path | None:
    wanted = os.environ.get("LCT_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if found is None and wanted == "1":
        raise SystemExit(
            "LCT_CUDA=1 but no nvcc on the PATH or under CUDA_HOME; set one of them, or LCT_CUDA=0"
        )
    return Path(found) if found else None


def toolkit(nvcc: Path) -> tuple[str, str]:
    """Include flags and library flags of the toolkit that nvcc belongs to, in nvcc's own words."""
    probe = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    words = {}
    for line in probe.stderr.splitlines():
        key, equals, value = line.removeprefix("#$ ").partition("=")
        if equals:
            words[key.strip()] = value.strip()
    if "INCLUDES" not in words or "LIBRARIES" not in words:
        raise SystemExit(f"cannot read the CUDA toolkit's folders from `{nvcc} --dryrun`:\n{probe.stderr}")
    includes, libraries = (words[key].replace('"', "") for key in ("INCLUDES", "LIBRARIES"))
    return includes.replace("-I", "-isystem "), libraries


def cuda_archs(nvcc: Path) -> list[str]:
    asked = os.environ.get("LCT_CUDA_ARCHS")
    archs = [arch.strip() for arch in (asked or DEFAULT_ARCHS).split(",") if arch.strip()]
    if asked is None:
        listed = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True)
        known = set(listed.stdout.split())
        archs = [a for a in archs if f"sm_{a.removesuffix('+PTX').rstrip('a')}" in known]
    return archs


def gencode(arch: str) -> str:
    number = arch.removesuffix("+PTX")
    code = f"compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode arch=compute_{number},code={code}"


class NinjaBuild(build_ext):
    """Writes build/native-*/build.ninja and runs it; what has not changed is not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # Apart, as neither kind of build can use the other's objects.
        folder = ROOT / "build" / f"native-{'cuda' if find_nvcc() else 'cpu'}-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / target.name
        write_ninja(folder / "build.ninja", built)

        import ninja

        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", "build.ninja"]
        if self.parallel:
            command += ["-j", str(self.parallel)]
        if subprocess.run(command, cwd=folder).returncode:
            raise SystemExit(f"building {ext.name} failed; what the compiler said stands above")
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new bytes in the old one: another process may have that mapped.
        fresh = target.with_name(f"{target.name}.new")
        shutil.copy2(built, fresh)
        fresh.replace(target)


def native_files() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]


def write_ninja(path: Path, output: Path) -> None:
    import pybind11
    from ninja import ninja_syntax

    cxx = compiler()
    nvcc = find_nvcc()
    cuda_sources = sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = X86_LEVELS if x86 else {"scalar": []}

    base = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
    base += [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    if x86:
        base.append("-DLCT_X86")
    base += shlex.split(os.environ.get("CXXFLAGS", ""))
    python = [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
    link = ["-shared", "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    else:
        # Static libraries inside (the CUDA runtime) must not meet another copy of themselves.
        link += ["-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]

    archs: list[str] = []
    libraries = [] if sys.platform == "darwin" else ["-ldl"]
    if nvcc and cuda_sources:
        archs = cuda_archs(nvcc)
        includes, library_folders = toolkit(nvcc)
        base += ["-DLCT_WITH_CUDA", includes]
        libraries = [library_folders, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]

    said = " ".join(flag for flag in base if not flag.startswith("-I") and "isystem" not in flag)
    info = [
        f"-DLCT_BUILD_CUDA_ARCHS='\"{','.join(archs)}\"'",
        f"-DLCT_BUILD_FLAGS='\"{said.replace(chr(34), '')}\"'",
    ]

    with path.open("w") as file:
        ninja = ninja_syntax.Writer(file, width=110)
        ninja.variable("ninja_required_version", "1.5")
        ninja.variable("base", base)
        ninja.rule(
            "cxx",
            f"{cxx} -MMD -MF $out.d $base $flags -c $in -o $out",
            description="C++ $out",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", f"{cxx} $in -o $out {' '.join(link + libraries)}", description="link $out")
        objects: list[str] = []

        def compile_cxx(source: Path, name: str, flags: list[str]) -> None:
            objects.append(f"{name}.o")
            ninja.build(f"{name}.o", "cxx", ninja_syntax.escape_path(str(source)), variables={"flags": flags})

        compile_cxx(CSRC / "bindings.cpp", "bindings", [*python, *info])
        for source in sorted((CSRC / "bindings").glob("*.cpp")):
            compile_cxx(source, f"bindings.{source.stem}", python)
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if source.stem.endswith("_simd"):
                for level, flags in levels.items():
                    flags = [*flags, *QUIET, *EXACT.get(source.stem, []), f"-DLCT_SIMD_LEVEL={level}"]
                    compile_cxx(source, f"{source.stem}.{level}", flags)
            elif source.stem.endswith("_vnni"):
                if x86:
                    compile_cxx(source, source.stem, [*X86_VNNI, *QUIET, "-DLCT_SIMD_LEVEL=avx512vnni"])
            else:
                compile_cxx(source, source.stem, [])
        if archs:
            codes = " ".join(map(gencode, archs))
            ninja.rule(
                "nvcc",
                f"{nvcc} -ccbin {cxx} -std=c++17 -O3 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden "
                f"-DLCT_WITH_CUDA -I{CSRC / 'include'} -I{CSRC} {codes} -MD -MF $out.d -c $in -o $out",
                description="CUDA $out",
                depfile="$out.d",
                deps="gcc",
            )
            for source in cuda_sources:
                objects.append(f"{source.stem}.cuda.o")
                ninja.build(objects[-1], "nvcc", ninja_syntax.escape_path(str(source)))
        ninja.build(ninja_syntax.escape_path(str(output)), "link", objects)
        ninja.default(ninja_syntax.escape_path(str(output)))


setup(
    packages=["lct_fast.kernels", *find_packages(include=["lct_fast", "lct_fast.*"])],
    # ninja knows the sources; setuptools needs them for the source distribution.
    ext_modules=[Extension("lct_fast._C", sources=[], depends=native_files())],
    cmdclass={"build_ext": NinjaBuild},
)
