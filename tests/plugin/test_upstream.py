"""lm_eval's own tests give the same outcomes with our start-up shim on and off. Slow: ``make upstream-tests``.

Without a hub, and with the sdist lacking some files of the repository, part of them fails either way: what counts is
that every single test ends alike.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lm_eval_softverb.autoload import SWITCH

pytestmark = [pytest.mark.upstream, pytest.mark.timeout(3600)]

VERSION = "0.4.13"
WITHOUT_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A folder with lm_eval's ``tests`` alone, so that they run against the installed lm_eval."""
    folder = tmp_path_factory.mktemp("upstream")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", folder, f"lm_eval=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the lm_eval {VERSION} sdist cannot be fetched: {done.stderr.strip()[-300:]}")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = [member for member in archive.getmembers() if "/tests/" in member.name]
        archive.extractall(folder, members=inside, filter="data")
    (tests,) = folder.glob("*/tests")
    return tests.parent


def outcomes(folder: Path, switch: str) -> dict[str, str]:
    """Run the tests with ``SOFTVERB_AUTOLOAD=switch``; test id → passed, failed, error or skipped."""
    report = folder / f"autoload-{switch}.xml"
    flags = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--timeout=120"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", *flags, f"--junitxml={report}"],
        cwd=folder,
        env=os.environ | WITHOUT_NETWORK | {SWITCH: switch},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    found = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
        outcome = next((kinds[part.tag] for part in case if part.tag in kinds), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def test_shim_changes_no_outcome(upstream):
    off, on = outcomes(upstream, "0"), outcomes(upstream, "1")
    for switch, found in (("off", off), ("on", on)):
        print(f"shim {switch}: {dict(collections.Counter(found.values()))}")
    assert off.keys() == on.keys()
    assert {test: (off[test], on[test]) for test in off if off[test] != on[test]} == {}
    assert collections.Counter(on.values())["passed"] > 400
