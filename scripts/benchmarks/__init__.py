"""What `scripts/benchmark.py` runs: cases, measurement and report. It is no part of the installed package."""
