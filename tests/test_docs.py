"""README, CONTRIBUTING and docs/: their Python runs, their commands are what the parser takes, their links lead on."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import lct_fast as lct
from lct_fast.cli import argument_parser
from lct_fast.cli.config import given, resolve
from tests.data.generated import cifar_python, labelled, write_tar
from tests.doc_blocks import PAGES, ROOT, blocks, taken_for_granted

# A split by measurement, a compiled graph, latencies.
SLOW = {"README.md", "docs/backend.md", "docs/exits.md"}
IN_PROCESS = [
    pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
    for page in PAGES
    if any(not b.processes for b in blocks(page))
]
UNDER_TORCHRUN = [(page, index) for page in PAGES for index, b in enumerate(blocks(page)) if b.processes]
# torchrun's.
FOREIGN_OPTIONS = {"--nproc-per-node", "--standalone", "--max-restarts", "--rdzv-endpoint"}


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as working directory and home, with the files that pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LCT_CACHE", str(tmp_path / "cache"))
    # Graphs are made as in a program; code for them, which takes inductor ten seconds, is the tests' of the ops.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    (tmp_path / "data").mkdir()
    # 150 training images, so that the pages' batches of 128 are full.
    files = cifar_python(False, labelled(10, 15, seed=1), labelled(10, 1, seed=2))
    write_tar(tmp_path / "data" / "cifar-10-python.tar.gz", files)
    (tmp_path / "FILE").write_text("to be or not to be, that is the question\n" * 60)
    return tmp_path


def _names(page: str) -> dict[str, Any]:
    """What ``taken_for_granted`` gives, and what one page adds to that in its text."""
    names = taken_for_granted()
    if page == "docs/layer_parallel.md":
        rows, batches = len(names["x"]), names["loader"]
        names["data"] = range(rows * len(batches))
        names["loader"] = [(x, y, torch.arange(rows) + i * rows) for i, (x, y) in enumerate(batches)]
    if page == "docs/exits.md":
        names["trainer"] = lct.Trainer(names["groups"], lct.Greedy())
    if page == "docs/text.md":
        names["FILE"] = "FILE"
    return names


@pytest.mark.parametrize("page", IN_PROCESS)
def test_python_runs(page: str, somewhere: Path, threads: None) -> None:
    names = _names(page)
    for block in blocks(page):
        if not block.processes:
            block.run(names)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "index"), UNDER_TORCHRUN)
def test_python_runs_under_torchrun(page: str, index: int, somewhere: Path) -> None:
    count = str(blocks(page)[index].processes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    command = [*launcher, str(ROOT / "tests/doc_blocks.py"), page, str(index)]
    with subprocess.Popen(
        command,
        # The folder of the script, whose names are also those of modules, stays off the path.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said


def _code_lines(page: str) -> list[str]:
    """Lines of code blocks, a line that ends in a backslash with the next one, and code within the text."""
    text = (ROOT / page).read_text()
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S)
    fenced = [content for language, content in fences if language != "python"]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    indented = re.findall(r"^    +\S.*$", text, re.M)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return [
        line.strip() for line in "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    ] + inline


def _commands(page: str) -> list[list[str]]:
    """What follows `lct-fast` or `-m lct_fast` in every command; FILE and the like stand for any name."""
    found = []
    for line in _code_lines(page):
        match = re.match(r"(?:lct-fast|(?:torchrun|python3?)\b.* -m lct_fast) (.*)", line)
        # `lct-fast bench [OP...]` is a form, and `lct-fast train: rank 2 ...` what a command says.
        if match and "[" not in line and not re.match(r"\w+:", match[1]):
            words = shlex.split(match[1], comments=True)
            found.append([word for word in words if word != "..."])
    return found


COMMANDS = [(page, " ".join(words)) for page in PAGES for words in _commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_what_the_parser_takes(page: str, command: str, somewhere: Path) -> None:
    words = shlex.split(command)
    if len(words) == 1:
        # The command's name alone, in a sentence.
        assert words[0] in _parsers()
        return
    args = argument_parser().parse_args(words)
    if args.command == "train":
        resolve(given(args))


def _parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in argument_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page: str) -> None:
    known = {option for parser in _parsers().values() for option in parser._option_string_actions}
    if page == "docs/gpu.md":
        # A page about another command.
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "benchmarks/gpu/command.py").read_text()))
    for line in _code_lines(page):
        # Benchmarks have options of their own; a path may hold two dashes.
        if "-m benchmarks" not in line and "pip " not in line:
            unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) - known - FOREIGN_OPTIONS
            assert not unknown, f"{page}: {', '.join(sorted(unknown))} in `{line}`"


def test_modules_that_are_run_exist() -> None:
    modules = {
        module
        for page in PAGES
        for line in _code_lines(page)
        for module in re.findall(r"-m ((?:benchmarks|tests)[\w.]*)", line)
    }
    assert len(modules) > 10
    for module in sorted(modules):
        assert find_spec(module) is not None, module


def _anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
            assert path.is_relative_to(ROOT) and path.exists(), f"{page}: {target}"
            assert not anchor or anchor in _anchors(path), f"{page}: {target}"


def test_the_index_has_every_page_once() -> None:
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text())
    assert sorted(linked) == sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Paths in backticks that begin in a folder of the project."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    folders = r"(?:benchmarks|csrc|docs|kernels|lct_fast|tests)"
    for path in re.findall(rf"`({folders}/[\w./*{{}},-]*)`", text):
        assert list(ROOT.glob(path)), f"{page}: {path}"


def _exists(name: str) -> bool:
    """A module, or something in one, under its whole name."""
    parts = name.replace("lct.", "lct_fast.", 1).split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[count:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_names_that_are_named_exist(page: str) -> None:
    """Dotted names of the package in backticks, with or without a call."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", text):
        for name in re.findall(r"(?<![\w./])(lct(?:_fast)?\.[\w.]*\w)", code):
            assert _exists(name), f"{page}: {name}"
