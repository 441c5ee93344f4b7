"""Measure our models and operators against other libraries: time, peak memory, and that the results are equal."""

import argparse
import os
import re
import shlex
import sys
from itertools import chain
from pathlib import Path

# Python looks into the folder of this file first, where evaluate.py would hide the library of that name.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry).resolve() != ROOT / "scripts")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the processes that measure memory
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from scripts.benchmarks import models, operators, report  # noqa: E402
from scripts.benchmarks.measuring import be_quiet, measure  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run the chosen cases; 1 if a result was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark"))
    parser.add_argument("--full", action="store_true", help="all sizes and classes (hours on a CPU)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own)")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on the rounds of a case (at least 3 rounds)")
    parser.add_argument("--budget_gib", type=float, default=6.0, help="plain formulas that need more are not run")
    parser.add_argument("--no_memory", action="store_true", help="leave out the peaks, which take a process each")
    given = parser.parse_args(arguments)
    be_quiet()
    if given.threads:
        torch.set_num_threads(given.threads)
    about = report.environment() | {"command": shlex.join(["scripts/benchmark.py", *arguments])}
    found = chain(operators.cases(given.full, given.quick), models.cases(given.full, given.quick))
    chosen = [case for case in found if re.search(given.only, case.name)]
    if given.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    results = []
    for device in [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]:
        for case in (case for case in chosen if device.type in case.devices):
            seconds = 0 if given.quick else given.seconds
            results.append(measure(case, device, int(given.budget_gib * 2**30), seconds, not given.no_memory))
            print(report.line(results[-1]), flush=True)
    about["load_at_end"] = report.load()
    print(f"\n{report.targets(results)}\n\nWritten to {given.output_dir}: benchmark.md, benchmark.json, plots.")
    report.write(results, about, given.output_dir)
    return 0 if all(result.correct(name) for result in results for name in result.sides) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
