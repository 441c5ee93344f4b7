"""Whether freed memory stays with the process, counted in page faults."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ctxseg import freed_memory

_FAULTS = """
import resource, runpy, sys

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"x" * (64 << 20)  # 16 Ki pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

runpy.run_path(sys.argv[1])["keep_freed_memory"]()
faults()
print(faults())
"""


def _faults(**environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, str(Path(freed_memory.__file__))],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_freed_memory is for the GNU C library")
def test_blocks_are_used_again_unless_the_environment_says_otherwise() -> None:
    assert _faults() < 1000
    assert _faults(MALLOC_ARENA_MAX="2") > 5 * 1000  # huge pages make fewer, larger faults
