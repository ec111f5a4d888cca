"""What the tests of several commands ask of an error."""

from __future__ import annotations

from click.testing import Result


def refused(result: Result, code: int, *words: str) -> None:
    """One line `error: ...`, at most one ` hint: ...` after it, nothing on stdout, no traceback."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith(" hint: "))
    for word in words:
        assert word in result.stderr
