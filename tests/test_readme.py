"""README: its commands exist."""

import re
from pathlib import Path

import pytest

from lct_fast.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"^lct-fast (\w+)", README, re.M))
    assert commands == {"train", "eval", "export", "bench", "plan", "report", "info"}
    for command in sorted(commands):
        with pytest.raises(SystemExit) as status:
            main([command, "--help"])
        assert status.value.code == 0
        assert command in capsys.readouterr().out
