"""What an index shows of the package is true, and what its extras ask for has a tested version."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def description(settings, readme):
    """What becomes of a README."""
    for each in settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        readme = re.sub(each["pattern"], each["replacement"], readme)
    return readme


def test_links_of_the_description_lead_somewhere_on_an_index(settings):
    shown = description(settings, (ROOT / "README.md").read_text())
    without_code = re.sub(r"```.*?```", "", shown, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)]*)\)", without_code)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("![A curve](docs/a.png)", "*A curve: `docs/a.png` in the source distribution.*"),
        ("[docs/a.md](docs/a.md)", "`docs/a.md`"),
        ("[how\nit works](docs/a-b.md#by-signs)", "how\nit works (`docs/a-b.md`)"),
        ("[counted](#on-a-network)", "counted"),
        ("[paper](https://arxiv.org/abs/1)", "[paper](https://arxiv.org/abs/1)"),
        ("layers[0](x)", "layers[0](x)"),
    ],
)
def test_what_becomes_of_a_link(settings, written, shown):
    assert description(settings, written) == shown


def test_classifiers_name_only_versions_that_a_test_ran(settings):
    tested = (ROOT / "docs/versions.txt").read_text().split("Not tried:")[0]
    pythons = [c.rsplit(" :: ", 1)[1] for c in settings["project"]["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert pythons
    assert [python for python in pythons if f"Python {python}" not in tested] == []


def test_constraints_pin_all_that_is_asked_for(settings):
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    pinned = {name.lower().replace("_", "-") for name in pinned}
    project = settings["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    asked += settings["build-system"]["requires"]
    names = {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in asked}
    assert names - pinned == set()
