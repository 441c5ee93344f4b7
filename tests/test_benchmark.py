"""The benchmark measures what it says, and a wrong result does not pass for a fast one."""

import json
import math
import time
from functools import partial

import pytest
import torch

from scripts.benchmarks import operators, report
from scripts.benchmarks.measuring import Case, Measured, Result, Side, Target, measure

CPU = torch.device("cpu")


def make_vector(error, pause, held, device):
    def step():
        time.sleep(pause)
        torch.zeros(held, dtype=torch.uint8)
        return [torch.tensor([0.0, 1.0]) + error]

    return step


def make_bytes(count, device):
    return lambda: [torch.zeros(count, dtype=torch.uint8)]


def case_of(*sides, target=None):
    return Case("one", "group", 1, sides, target)


def test_times_are_those_of_one_call():
    sides = (Side("ours", partial(make_vector, 0, 0.001, 0)), Side("slow", partial(make_vector, 0, 0.05, 0)))
    result = measure(case_of(*sides), CPU, budget=0, seconds=0, memory=False)
    assert 0.001 <= result.sides["ours"].seconds < 0.05 <= result.sides["slow"].seconds
    assert result.rounds == 3


def test_ratios_are_against_the_best_shipped_peer():
    names = {"ours": True, "slow": True, "slower": True, "tuned": False}
    sides = [Side(name, partial(make_vector, 0, 0, 0), shipped=shipped) for name, shipped in names.items()]
    result = Result(case_of(*sides), "cpu", sides={})
    for name, seconds in zip(names, (1.0, 4.0, 8.0, 2.0), strict=True):
        result.sides[name] = Measured(seconds=seconds)
    assert result.ratio("ours", "seconds") == 4
    assert result.ratio("ours", "seconds", shipped_only=False) == 2
    assert result.ratio("ours", "mebibytes") is None


@pytest.mark.parametrize(("error", "correct"), [(5e-5, True), (2e-4, False), (math.nan, False)])
def test_a_wrong_result_fails_its_target(error, correct):
    sides = (Side("ours", partial(make_vector, error, 0, 0)), Side("plain", partial(make_vector, 0, 0.01, 0)))
    result = measure(case_of(*sides, target=Target("a row", 1.0)), CPU, budget=0, seconds=0, memory=False)
    assert result.correct("ours") is correct
    assert ("**not met**" in report.targets([result])) is not correct
    assert ("FAILED" in report.markdown([result], report.environment())) is not correct


def test_a_way_that_needs_more_than_the_budget_is_not_run():
    sides = (Side("ours", partial(make_vector, 0, 0, 0)), Side("huge", partial(make_bytes, 2**60), needs=2**60))
    result = measure(case_of(*sides, target=Target("a row", 1.0)), CPU, budget=2**30, seconds=0, memory=False)
    assert result.sides["huge"].note == f"not run: needs {2**30:.1f} GiB"
    assert "not measured" in report.targets([result])


def test_every_operator_of_the_quick_run_equals_its_formula():
    for case in operators.cases(full=False, quick=True):
        result = measure(case, CPU, budget=2**30, seconds=0, memory=False)
        for name, found in result.sides.items():
            assert found.seconds > 0, case.name
            assert result.correct(name), (case.name, name, found.difference)
        assert result.sides["ours"].difference is not None


@pytest.mark.figures
def test_report_holds_every_figure(tmp_path):
    pixels = [case for case in operators.cases(full=False, quick=True) if case.name.startswith("arg-max K=21")]
    positions = [case for case in operators.cases(full=False, quick=True) if "concatenation training" in case.name]
    results = [measure(case, CPU, 2**30, 0, memory=False) for case in (*pixels, *positions)]
    report.write(results, report.environment(), tmp_path)
    written = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert [entry["case"] for entry in written["results"]] == [result.case.name for result in results]
    assert (tmp_path / "positions-cpu.png").stat().st_size > 10_000
    table = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert all(f"| {result.case.name} (cpu) | ours |" in table for result in results)


def test_growth_is_the_exponent_between_the_largest():
    results = []
    for n, memory in ((10, 900.0), (100, 1000.0), (1000, 100_000.0)):
        result = Result(Case(str(n), "dot product, training", n, ()), "cpu", sides={})
        result.sides["ours"] = Measured(mebibytes=memory)
        results.append(result)
    assert "| dot product, training (cpu) | 2.00 | 1.1 | **not met** |" in report.targets(results)


@pytest.mark.slow  # a server of processes, which loads every library
def test_peak_is_that_of_a_fresh_process():
    sides = (Side("ours", partial(make_bytes, 2**26)), Side("large", partial(make_bytes, 2**28)))
    case = Case("one", "group", 1, sides, timed=False)
    result = measure(case, CPU, budget=2**30, seconds=0)
    assert result.sides["ours"].mebibytes == pytest.approx(64, abs=2)
    assert result.sides["large"].mebibytes == pytest.approx(256, abs=2)
