"""The deliberate mistakes of `scripts/defects*.toml` still fit the code and name tests that are there.

That these tests notice them is for `scripts/defects.py` to prove; it takes minutes.
"""

import re
from collections import Counter

import pytest

from defects import ROOT, Defect, DefectError, Edit, Verdict, catalog, survivors

DEFECTS = catalog()


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("defect", DEFECTS, ids=[defect.name for defect in DEFECTS])
def test_a_defect_still_applies(defect: Defect) -> None:
    assert all(text != read(path) for path, text in defect.applied(read).items())


@pytest.mark.parametrize("defect", DEFECTS, ids=[defect.name for defect in DEFECTS])
def test_the_tests_of_a_defect_are_there(defect: Defect) -> None:
    assert defect.tests
    for test in defect.tests:
        path, _, name = test.partition("::")
        assert not name or re.search(rf"\bdef {name.partition('[')[0]}\(", read(path)), test


def test_each_defect_has_a_name_of_its_own() -> None:
    assert not [name for name, count in Counter(defect.name for defect in DEFECTS).items() if count > 1]


def test_a_defect_that_no_longer_applies_says_so() -> None:
    gone = Defect("gone", "nothing", [], [Edit("README.md", "a text that stands nowhere", "")])
    with pytest.raises(DefectError, match="the defect gone no longer applies"):
        gone.applied(read)


def test_a_change_of_nothing_is_no_defect() -> None:
    with pytest.raises(DefectError):
        Edit("README.md", "same", "same").applied("same")


def test_a_defect_that_nothing_notices_is_named() -> None:
    verdicts = [Verdict("seen", "much", "tests/test_x.py::test_y", 1.0), Verdict("unseen", "much", None, 1.0)]
    assert survivors(verdicts) == ["unseen"]
