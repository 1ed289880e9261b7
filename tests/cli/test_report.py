"""What the commands say of a merge: whether the update was kept."""

import pytest

import vera_func as vf
from vera_func.cli.report import merge_advice

from refused import Refused


# What is refused

bad = Refused()

bad("merge_advice", "one report", lambda _: merge_advice(vf.MergeReport(1.0, 0.0, 1.0)), "by module, got MergeReport")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
