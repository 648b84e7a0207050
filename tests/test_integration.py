"""What `make integration` makes of parts that pass, fail, or skip."""

import sys

import pytest

import integration
from integration import SKIPPED, Part, main


def part(name: str, program: str) -> Part:
    return Part(name=name, minutes=0.1, command=[sys.executable, "-c", program])


PASSES = part("passes", "print('fine')")


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(3)",
        f"raise SystemExit({SKIPPED})",
        "print('===== 3 passed, 1 skipped in 2.05s =====')",
        "print('1 skipped, 2 warnings in 0.10s')",
    ],
)
def test_a_part_that_fails_or_skips_fails_and_the_next_one_runs_all_the_same(program, capfd):
    assert main([part("heavy", program), PASSES]) == 1
    said = capfd.readouterr().out
    assert "integration: 1 passed, 1 failed heavy" in said
    assert "fine" in said and "(usually 0.1)" in said


def test_parts_that_pass_pass(capfd):
    tests = part("tests", "print('==== 12 passed, 3 warnings in 9.10s ====\\nnothing was skipped in 3 s')")
    assert main([PASSES, tests]) == 0
    assert "integration: 2 passed, 0 failed" in capfd.readouterr().out


def test_parts_are_chosen_by_name(capfd):
    fails = part("fails", "raise SystemExit(1)")
    assert main([PASSES, fails], ["passes"]) == 0
    assert main([PASSES, fails], ["pases"]) == 2
    assert "there is no part pases; there are passes, fails" in capfd.readouterr().out


def test_the_demo_is_the_first_part():
    assert integration.PARTS[0].command == ["make", "demo"]
