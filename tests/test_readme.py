"""What the README shows, runs."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert blocks
    for block in blocks:
        names = {}
        exec(compile(block, str(README), "exec"), names)  # noqa: S102
        assert names["loss"].isfinite()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_commands_are_one_line_each():
    """The checks of a clean checkout take the test command from here."""
    commands = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/python examples/quickstart.py")
    assert " && .venv/bin/python -m pytest" in commands[1]
