"""The results in the documentation are consistent with each other."""

import itertools
import pathlib
import re

import pytest
from claims import catalogue, claim_report, claim_results, verdicts

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "docs" / "claims").iterdir())


def number_of_claims(results, verdict):
    """Counts claims, some of which have several modules, such as C36a and C36b."""
    claims = itertools.groupby(results, key=lambda each: each["id"][:3])
    return sum(all(each["verdict"] in verdict for each in parts) for _, parts in claims)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_are_those_of_the_results(folder):
    results = claim_results.read(folder)
    assert {each["id"] for each in results} <= set(catalogue.CLAIMS)
    assert (folder / "table.md").read_text() == claim_report.markdown(results)
    assert (folder / "compact.md").read_text() == claim_report.compact(results)
    for each in results:
        parts = [verdicts.Part(part["statistic"], 0.0, (0.0, 0.0), part["verdict"]) for part in each["parts"]]
        assert each["verdict"] == verdicts.overall(parts), each["id"]
        assert not each["settings"]["quick"] and f"seeds_{each['seeds'][0]}_to_{each['seeds'][-1]}" == folder.name


def test_the_documents_state_the_number_of_shown_claims():
    results = claim_results.read(ROOT / "docs" / "claims" / "seeds_0_to_4")
    shown, measured = number_of_claims(results, ["shown"]), number_of_claims(results, claim_report.COLORS)
    stated = re.findall(r"(\d+) of (\d+) published claims shown", (ROOT / "README.md").read_text())
    assert stated == [(str(shown), str(measured))]
    assert f"{shown} are shown" in (ROOT / "docs" / "claims.md").read_text()
