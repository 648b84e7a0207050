"""The fuzzer: a small run of it finds nothing, and each kind of fault that is planted is found and named."""

import os
import re
import signal
import time

import fuzz
import numpy as np
import pytest
import torch
from fuzz import Limits, numbered
from fuzz_target import FORMATS, MEDIA, Target

from anymal.errors import BadSample

SEED, COUNT = 3, 600
"""Of the small run; more mutants find more."""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return Target(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "cache"))


def _planted(target, fault, folder, monkeypatch, *, count=3, limits=None, **options):
    """The report of a run in which pictures are decoded by `fault`."""
    for profile in target.profiles:
        monkeypatch.setitem(profile.prepare.decoders, "image", fault)
    limits = limits or Limits(seconds=2.0, wall=30.0, memory=200 << 20)
    return fuzz.fuzz(target, numbered(count, ["png"]), 0, folder=folder, limits=limits, **options)


def test_a_small_run_finds_nothing(target, tmp_path):
    report = fuzz.fuzz(target, numbered(COUNT), SEED, folder=tmp_path)
    assert report.met(), report.findings or report.shallow()
    assert set(report.count) == set(FORMATS)
    last = report.last_line(SEED, 9.6, report.met())
    pattern = rf"seed={SEED} count={COUNT} crashes=0 hangs=0 memory=0 unnamed=0 past_header=\d+% seconds=10 goal=met"
    assert re.fullmatch(pattern, last)


def test_a_mutant_depends_on_seed_format_and_number_alone(target):
    for kind in FORMATS:
        (one, _), (again, _), (other, _) = (target.mutant(5, kind, n) for n in (7, 7, 8))
        assert (one.members, one.tar, one.cached) == (again.members, again.tar, again.cached), kind
        assert kind == "index" or (one.members, one.tar, one.cached) != (other.members, other.tar, other.cached), kind


def test_every_kind_of_medium_is_attacked(target):
    from fuzz_target import SUFFIXES

    assert {medium.suffix for medium in MEDIA.values()} | {"jpeg"} == set(SUFFIXES)


def test_a_decoder_that_dies_is_a_crash_and_the_rest_of_its_batch_is_still_read(target, tmp_path, monkeypatch, capsys):
    def dies(_):
        os.kill(os.getpid(), signal.SIGSEGV)

    report = _planted(target, dies, tmp_path, monkeypatch)
    assert [(verdict, kind, number) for verdict, kind, number, _ in report.findings] == [
        ("crash", "png", number) for number in range(3)
    ]
    assert "SIGSEGV" in report.findings[0][3]
    assert report.count["png"] == 3
    assert "python tests/fuzzing/fuzz.py --seed 0 --formats png --only 1\n" in capsys.readouterr().out
    assert (tmp_path / "png-1" / "a.tar").stat().st_size > 0


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_decoder_that_hangs_is_a_hang(target, tmp_path, monkeypatch, sleeps):
    def hangs(_):
        while True:
            time.sleep(60 if sleeps else 0)

    limits = Limits(seconds=0.5, wall=20.0)
    report = _planted(target, hangs, tmp_path, monkeypatch, count=2, limits=limits)
    assert [verdict for verdict, *_ in report.findings] == ["hang", "hang"]
    assert ("asleep" if sleeps else "processor") in report.findings[0][3]


@pytest.mark.parametrize("size", [300 << 20, 1 << 40])
def test_a_decoder_that_fills_memory_is_found_even_if_it_lets_go_or_is_refused(target, tmp_path, monkeypatch, size):
    def fills(_):
        np.ones(size, np.uint8)
        raise BadSample("too large")

    report = _planted(target, fills, tmp_path, monkeypatch)
    assert [verdict for verdict, *_ in report.findings] == ["memory"] * 3


def _raises(error):
    def decoder(_):
        raise error

    return decoder


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda _: torch.full((3, 32, 32), float("nan")), "not finite"),
        (lambda _: torch.full((3, 32, 32), 1e30), "not finite"),
        (lambda _: torch.zeros(3, 32, 31), "is [3, 32, 31]; wanted is [3, 32, 32]"),
        (_raises(BadSample("")), "a reason of 0 characters"),
        (_raises(fuzz.anymal.errors.UserError("something is wrong")), "does not name"),
        (_raises(BaseException("a panic")), "raises BaseException: a panic"),
    ],
)
def test_what_is_neither_good_nor_named_is_found(target, tmp_path, monkeypatch, fault, seen):
    monkeypatch.setattr(
        "anymal.data.feature_codec.check", lambda *_: None
    )  # else what is not finite is refused, and by name
    report = _planted(target, fault, tmp_path, monkeypatch, count=2)
    assert [verdict for verdict, *_ in report.findings] == ["unnamed"] * 2
    assert seen in report.findings[0][3]


def test_refusals_with_a_reason_are_no_findings(target, tmp_path, monkeypatch):
    report = _planted(target, _raises(BadSample("the medium is cut off")), tmp_path, monkeypatch)
    assert not report.findings and report.count["png"] == 3
    assert not list(tmp_path.glob("png-*")), "only findings are kept"


def test_a_search_that_stays_in_the_headers_is_no_success():
    report = fuzz.Report()
    report.count["png"], report.past["png"] = 100, 29
    assert report.shallow() == ["png"] and not report.met()
    report.past["png"] = 30
    assert report.met()
