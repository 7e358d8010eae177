"""README and docs: what they point to exists, and each of their blocks of code is executed or checked."""

import ast
import builtins
import dis
import json
import os
import re
import subprocess
import types
from datetime import timedelta
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_onebit

yaml = pytest.importorskip("yaml")  # Lightning brings it

ROOT = Path(__file__).resolve().parents[2]
TESTS = {file.stem: file.read_text() for file in ROOT.glob("tests/*/test_*.py")}
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(language):
    """Of all pages, with an id for pytest."""
    found = []
    for page in PAGES:
        for number, (indent, kind, text) in enumerate(FENCE.findall(page.read_text())):
            if kind == language:
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                found.append(pytest.param("\n".join(lines), id=f"{page.name}-{number}"))
    return found


# Code


@pytest.fixture
def names():
    """What fragments take from the script that they belong to."""
    public = {name: getattr(lightning_onebit, name) for name in lightning_onebit.__all__}
    of_lightning = {"pl": pl, "Trainer": pl.Trainer, "Fabric": Fabric, "ModelCheckpoint": ModelCheckpoint}
    return {
        **public,
        **of_lightning,
        "torch": torch,
        "timedelta": timedelta,
        "strategy": mock.MagicMock(spec=lightning_onebit.OneBitDDPStrategy),
        "tensor": torch.ones(16),
        "model": None,
        "datamodule": None,
        "__name__": "documented",
    }


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compiled = compile(code, "block", "exec")
    with mock.patch.dict(os.environ), mock.patch.object(pl.Trainer, "fit"):  # a Trainer writes into the environment
        exec(compiled, names)
    assert not unresolved(compiled, names), "names that functions of the block would not find"


def unresolved(code, names):
    """Global names that functions of the code read, and that are not there once it has run."""
    read = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    missing = {name for name in read if name not in names and not hasattr(builtins, name)}
    return missing.union(*(unresolved(each, names) for each in inner))


def test_the_script_to_copy_is_the_example():
    example = (ROOT / "examples/minimal.py").read_text()
    (script,) = re.findall(r"```python\n(import lightning.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example.endswith(script)


PROGRAMS = {"pip", "python", "make", "torchrun", "srun", "sudo", "export", "mkdocs"}
OF_THE_USER = {"train.py"}


@pytest.mark.parametrize("text", blocks("bash"))
def test_shell_commands_are_well_formed_and_name_what_exists(text):
    subprocess.run(["bash", "-n", "-c", text], check=True)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in text.replace("\\\n", " ").splitlines():
        words = [word for word in line.split("#")[0].split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if not words:
            continue
        assert words[0] in PROGRAMS
        assert words[0] != "make" or words[1] in targets
        for word in words[1:]:
            assert not word.endswith(".py") or word in OF_THE_USER or (ROOT / word).is_file(), word


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_read_and_its_classes_exist(text):
    def classes(node):
        if isinstance(node, dict):
            for key, value in node.items():
                yield from [(value, node.get("init_args", {}))] if key == "class_path" else classes(value)
        elif isinstance(node, list):
            for each in node:
                yield from classes(each)

    found = list(classes(yaml.safe_load(text)))
    assert found
    for path, arguments in found:
        package, _, name = path.rpartition(".")
        assert package == "lightning_onebit"
        getattr(lightning_onebit, name)(**arguments)


def test_every_block_says_what_it_is():
    kinds = {kind for page in PAGES for _, kind, _ in FENCE.findall(page.read_text())}
    assert kinds <= {"python", "bash", "yaml", "json", ""}  # without a name: output, formulas, pictures of characters
    for json_block in blocks("json"):
        json.loads(*json_block.values)
    code = re.compile(r"^\s*(import |from \w+ import|pip |python |make |export )", re.MULTILINE)
    assert not [
        text for page in PAGES for _, kind, text in FENCE.findall(page.read_text()) if not kind and code.search(text)
    ]


def test_slurm_asks_for_as_many_processes_as_the_script():
    page = (ROOT / "docs/multinode.md").read_text()
    ((devices, nodes),) = set(re.findall(r"devices=(\d+), num_nodes=(\d+)", page))
    assert re.findall(r"#SBATCH --nodes=(\d+)", page) == [nodes]
    assert re.findall(r"#SBATCH --ntasks-per-node=(\d+)", page) == [devices]
    assert set(re.findall(r"--nnodes (\d+) --nproc-per-node (\d+)", page)) == {(nodes, devices)}


def test_recipes_ran_as_they_are_written():
    log = (ROOT / "benchmarks/results/recipes.txt").read_text()
    page = (ROOT / "docs/multinode.md").read_text()
    recipes = re.findall(r"```bash\n(# (?:first|second) machine\n.*?)```", page, re.DOTALL)
    assert len(recipes) == 4
    assert all(recipe in log for recipe in recipes)
    assert log.count("exit code 0") == 4


# Words


def test_messages_of_the_troubleshooting_page_are_the_librarys():
    said = "\n".join(text for file in ROOT.glob("lightning_onebit/**/*.py") for text in strings(ast.parse(file.read_text())))
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 30
    parts = [part.strip() for line in quoted for part in line.split("…") if part.strip(" ,.:")]
    assert not [part for part in parts if part not in said]


def strings(tree):
    """All string constants; of one with values in it, the text between them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_reference_has_all_public_names():
    listed = re.findall(r"^::: lightning_onebit\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(lightning_onebit.__all__)


def test_the_site_has_all_pages():
    text = (ROOT / "docs/site/mkdocs.yml").read_text()
    listed = re.findall(r"^ +- (?:[\w ]+: )?([\w/.-]+\.md)$", text, re.MULTILINE)
    pages = {name for name in listed if not name.startswith("repository/")}
    assert pages == {"index.md"} | {page.name for page in ROOT.glob("docs/*.md")}


def test_tables_of_arguments_are_those_of_the_code():
    text = (ROOT / "docs/settings.md").read_text() + (ROOT / "docs/switching.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))
    defaults = lightning_onebit.OneBitDDPStrategy.__init__.__kwdefaults__
    fields = lightning_onebit.VarianceStability.__dataclass_fields__
    defaults |= {name: field.default for name, field in fields.items()}
    assert {name: json.dumps(value) if isinstance(value, str) else str(value) for name, value in defaults.items()} == {
        name: value.strip("`") for name, value in rows.items() if name in defaults
    }


def test_the_table_of_compatibility_names_tests_that_exist():
    document = (ROOT / "docs/compatibility.md").read_text()
    files = {"P": "test_precision"} | dict(re.findall(r"\b([A-Z])\s+`(test_\w+)`", document))
    rows = [line.split("|")[-2] for line in document.splitlines() if line.startswith("| ")]
    named = [
        (letter, name)
        for cell in rows
        for letter, names in re.findall(r"\b([A-Z])((?: `\w+`,?)+)", cell)
        for name in re.findall(r"`(\w+)`", names)
    ]
    assert len(named) > 60
    missing = [f"{letter} {name}" for letter, name in named if not re.search(rf"def test_\w*{name}", TESTS[files[letter]])]
    assert not missing


def test_links_between_documents_lead_somewhere():
    broken = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not broken


def test_links_to_sections_lead_to_one():
    broken = [
        f"{document.relative_to(ROOT)}: {target}#{section}"
        for document in DOCUMENTS
        for target, section in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", document.read_text())
        if section not in sections((document.parent / target) if target else document)
    ]
    assert not broken


def sections(document):
    """The names by which a code host, and the site, link to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
