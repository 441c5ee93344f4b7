"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `make test-floor` installs them."""

import sys
from itertools import chain
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib  # pip carries the parser for Pythons without one


def floors(pyproject: str) -> list[str]:
    """Give what the package and its extras require, each `>=` turned into `==`.

    Raises:
        ValueError: A requirement states no lowest version.
    """
    project = tomllib.loads(pyproject)["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for requirement in requirements:
        if requirement.partition(";")[0].count(">=") != 1:
            raise ValueError(f"{requirement!r} states no lowest version: write NAME>=VERSION.")
    return [requirement.replace(">=", "==", 1) for requirement in requirements]


if __name__ == "__main__":
    print(*floors(Path("pyproject.toml").read_text(encoding="utf-8")), sep="\n")
