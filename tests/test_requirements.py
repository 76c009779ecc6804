"""The versions that a push is tested with fit the lower bounds that users install by."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def read(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize(
    "requirement", read("requirements.txt") + read("tests/requirements.txt"), ids=str
)
def test_the_tested_version_fits_the_bound(requirement):
    """One exact version for every package, and bounds are lower bounds only."""
    tested = {canonicalize_name(r.name): r.specifier for r in read("tests/constraints.txt")}
    (exact,) = tested[canonicalize_name(requirement.name)]
    assert exact.operator == "=="
    assert requirement.specifier.contains(exact.version)
    assert [bound.operator for bound in requirement.specifier] == [">="]
