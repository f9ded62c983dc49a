"""Other packages that do the same jobs: which are installed, and how to get the others."""

from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec

# The module that is imported: the package that holds it, and the extra of lct-fast that installs it.
PACKAGES = {
    "faiss": ("faiss-cpu", "rivals"),
    "vector_quantize_pytorch": ("vector-quantize-pytorch", "rivals"),
    "flash_kmeans": ("flash-kmeans", "rivals-gpu"),
    "liger_kernel": ("liger-kernel", "rivals-gpu"),
    "quack": ("quack-kernels", "rivals-gpu"),
}


def installed(module: str) -> bool:
    """Whether a rival can be imported."""
    return find_spec(module) is not None


def missing(modules: Iterable[str]) -> list[str]:
    """A line for each rival that is not installed: what to do."""
    lines = []
    for package, extra in sorted(PACKAGES[module] for module in modules if not installed(module)):
        lines.append(f"{package} is not installed; pip install 'lct-fast[{extra}]'")
    return lines


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Versions of the rivals that are installed."""
    return {
        PACKAGES[module][0]: metadata.version(PACKAGES[module][0]) for module in modules if installed(module)
    }
