"""The rules of the architecture, read from the sources: floors, no circles, names, collectives, no print, a light import."""

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch.strategies import DDPStrategy

import lightning_onebit

PACKAGE = "lightning_onebit"
ROOT = Path(lightning_onebit.__file__).parent

FLOORS = [
    {"arguments"},
    {"coefficients", "config", "flat", "phase", "version"},
    {"refresh_schedule"},
    {"quantize", "methods", "freeze"},
    {"comm"},
    {"consistency"},
    {"engine"},
    {"checkpoint"},
    {"lightning"},
    {"doctor"},
    {"__main__"},
    {"__init__"},
]
"""Sub-packages and single modules, lowest first. A module imports from floors below its own and from its own sub-package."""
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

FORBIDDEN_WORDS = re.compile(
    r"Run|runs|(?i:division|pieces?|facts?|twins?|lanes?|tickets?|settle[ds]?|wakes?|anticipate[ds]?|pipelines?|shards?"
    r"|codecs?|consensus|thaw(?:ed|s)?)"
)
"""Words of identifiers that mean something else in this field, or nothing. (`run` as a verb is none of them.)"""

NO_TORCH = {
    "arguments",
    "coefficients",
    "config",
    "phase",
    "refresh_schedule",
    "version",
    "freeze",
    "comm.stats",
    "comm.topology",
    "doctor.advice",
    "doctor.cost_model",
    "doctor.links",
    "quantize.layout",
}
"""Sub-packages and modules of plain numbers: they import neither torch nor Lightning."""

COLLECTIVE_STEMS = (
    "all_reduce", "all_gather", "all_to_all", "reduce_scatter", "broadcast", "barrier", "monitored_barrier",
    "gather", "scatter", "reduce", "send", "recv", "isend", "irecv", "batch_isend_irecv", "allreduce", "allgather",
)  # fmt: skip
"""A name of torch.distributed that is one of these, or goes on with ``_``, communicates."""


@functools.cache
def sources():
    """Syntax trees by dotted module name; packages end in ``__init__``."""
    files = sorted(ROOT.rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text(), str(file)) for file in files}


def component(module):
    return module.split(".")[0]


def absolute_imports(module, tree):
    """Dotted names that ``tree`` imports, at any depth of nesting; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = [PACKAGE, *module.split(".")[:-1]]
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def imported_components(module, tree):
    """Components of the package that ``tree`` imports; a name of the package itself is in its ``__init__``."""
    for name in absolute_imports(module, tree):
        first, *rest = name.split(".")
        if first == PACKAGE:
            modules = {component(m) for m in sources()}
            yield rest[0] if rest and rest[0] in modules else "__init__"


def imported_names(tree):
    """Imported names as they are called in ``tree``, with their full dotted names."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.name if alias.asname else alias.name.split(".")[0]
                names[alias.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node, names):
    """Full dotted name of an expression such as ``dist.all_reduce``; empty if it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def uses_of_torch_distributed(tree):
    """Dotted names below torch.distributed that occur anywhere in ``tree``."""
    names = imported_names(tree)
    occurring = {dotted(node, names) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    return {name for name in occurring | set(names.values()) if f"{name}.".startswith("torch.distributed.")}


def is_collective(name):
    last = name.rsplit(".", 1)[-1]
    return any(last == stem or last.startswith(f"{stem}_") for stem in COLLECTIVE_STEMS)


def modules_imported(module, tree, modules):
    """Modules of the package that ``tree`` imports by name, at any depth of nesting: also in functions, and for types only.

    That importing ``a.b`` runs ``a/__init__.py`` first does not count, or all would import the package itself.
    """
    for name in absolute_imports(module, tree):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        candidates = [".".join(parts[1:end]) for end in range(len(parts), 0, -1)]  # the longest first
        options = [option for c in candidates for option in (c, f"{c}.__init__".lstrip("."))]
        yield next(option for option in options if option in modules)


def circle(trees):
    """Modules of ``trees`` that import each other, in a circle; ``None`` if there is none."""
    graph = {module: set(modules_imported(module, tree, trees)) for module, tree in trees.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def imports_upward():
    """Module, and a component that it imports although that is not below its own."""
    return {
        (module, target)
        for module, tree in sources().items()
        for target in imported_components(module, tree)
        if target != component(module) and FLOOR_OF[target] >= FLOOR_OF[component(module)]
    }


def identifiers(module, tree):
    """Every name in ``tree``: of the module, classes, functions, arguments, variables, attributes and imports."""
    yield from module.split(".")
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield from value.split(".")


def forbidden_words(module, tree):
    """Forbidden words in the names of ``tree``, in lower case. A word ends at ``_`` or before a capital letter."""
    words = {word for name in identifiers(module, tree) for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return {word.lower() for word in words if FORBIDDEN_WORDS.fullmatch(word)}


def test_every_module_has_a_floor():
    assert {component(module) for module in sources()} <= set(FLOOR_OF)


def test_imports_go_downward():
    assert imports_upward() == set()


def test_no_module_imports_itself_by_way_of_others():
    assert circle(sources()) is None


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "from lightning_onebit import b", "b": "import torch", "__init__": ""}, False),
        (
            {"a": "from lightning_onebit import b", "b": "def f():\n    from lightning_onebit.a import x", "__init__": ""},
            True,
        ),
        ({"a": "if TYPE_CHECKING:\n    import lightning_onebit.b", "b": "from .a import x", "__init__": ""}, True),
        ({"c.__init__": "from lightning_onebit.c.d import x", "c.d": "from lightning_onebit.c import y"}, True),
        ({"c.__init__": "from lightning_onebit.c.d import x", "c.d": "from . import e", "c.e": ""}, False),
    ],
)
def test_a_circle_is_found_however_it_is_hidden(sources, found):
    assert (circle({module: ast.parse(source) for module, source in sources.items()}) is not None) == found


def test_no_identifier_has_a_forbidden_name():
    found = {module: forbidden_words(module, tree) for module, tree in sources().items()}
    assert {m: words for m, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "source", ["class Run: ...", "x.wake_up()", "f(lane=1)", "def settled(): ...", "import a as twin", "CpuCodec"]
)
def test_a_forbidden_name_is_found_wherever_it_occurs(source):
    assert forbidden_words("a", ast.parse(source))


def test_verbs_and_longer_words_are_not_forbidden():
    assert not forbidden_words("a", ast.parse("self._forget_run(); planes; manufacture; trailing_run"))


@pytest.mark.parametrize(
    ("strategy", "base"),
    [
        (lightning_onebit.OneBitDDPStrategy, DDPStrategy),
        (lightning_onebit.OneBitDDPFabricStrategy, FabricDDPStrategy),
    ],
)
def test_strategies_mix_nothing_into_ddp(strategy, base):
    assert strategy.__bases__ == (base,)


def test_quantizers_and_methods_do_not_know_torch_distributed():
    users = {
        module: names
        for module, tree in sources().items()
        if FLOOR_OF[component(module)] < FLOOR_OF["comm"] and (names := uses_of_torch_distributed(tree))
    }
    assert not users


def test_settings_layouts_and_criteria_need_no_torch():
    importers = [
        module
        for module, tree in sources().items()
        if {component(module), module} & NO_TORCH
        and any(name.split(".")[0] in {"torch", "lightning"} for name in absolute_imports(module, tree))
    ]
    assert not importers


def test_only_primitives_call_collectives():
    callers = {
        module: collectives
        for module, tree in sources().items()
        if (collectives := {name for name in uses_of_torch_distributed(tree) if is_collective(name)})
    }
    assert set(callers) == {"comm.primitives"}, callers


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "from torch import distributed as d\nd.all_gather_into_tensor(x, y)",
        "import torch\ntorch.distributed.reduce_scatter_tensor(x, y)",
        "from torch.distributed import broadcast as b\nb(x)",
        "import torch.distributed as dist\nf = dist.all_to_all_single",
        "from torch.distributed.nn.functional import all_reduce",
    ],
)
def test_a_collective_is_recognized_however_it_is_imported(source):
    assert any(is_collective(name) for name in uses_of_torch_distributed(ast.parse(source)))


def test_types_and_process_group_management_are_no_collectives():
    source = (
        "import torch.distributed as dist\ndef f(g: dist.ProcessGroup, b: dist.GradBucket): dist.new_group(); dist.ReduceOp"
    )
    names = uses_of_torch_distributed(ast.parse(source))
    assert "torch.distributed.GradBucket" in names
    assert not any(is_collective(name) for name in names)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("quantize.cpu", "from lightning_onebit.comm.primitives import Communicator", ["comm"]),
        ("quantize.cpu", "from ..engine import x", ["engine"]),
        ("quantize.cpu", "from .layout import x", ["quantize"]),
        ("quantize.cpu", "def f():\n    from lightning_onebit import checkpoint, Phase", ["checkpoint", "__init__"]),
        ("config", "import lightning_onebit.comm.primitives", ["comm"]),
        ("config", "from . import comm", ["comm"]),
        ("config", "import torch", []),
    ],
)
def test_imports_are_resolved_however_they_are_written(module, source, expected):
    assert list(imported_components(module, ast.parse(source))) == expected


def test_the_library_does_not_print():
    printing = [
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


IMPORT_PROBE = """
import importlib.abc, sys, time

class NoTriton(importlib.abc.MetaPathFinder):
    wanted = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            self.wanted.append(name)
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, NoTriton())
import torch, lightning.pytorch
assert not torch.cuda.is_available()
assert "lightning_onebit" not in sys.modules

NoTriton.wanted.clear()
start = time.process_time()
import lightning_onebit
seconds = time.process_time() - start

assert not NoTriton.wanted and "triton" not in sys.modules, NoTriton.wanted
assert not torch.distributed.is_initialized()
assert "onebit_ddp" in lightning.pytorch.strategies.StrategyRegistry.available_strategies()
assert all(hasattr(lightning_onebit, name) for name in lightning_onebit.__all__)
assert torch.equal(lightning_onebit.compressed_all_reduce(torch.full((3, 5), -2.0)), torch.full((3, 5), -2.0))
print(seconds)
"""


def seconds_to_import():
    """Processor time that the package adds to ``import torch, lightning.pytorch``, in a fresh process, no Triton or GPU.

    What else the machine does adds to the time that passes, but hardly to this.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT.parent)}
    probe = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert probe.returncode == 0, probe.stderr
    return float(probe.stdout.split()[-1])


def test_import_is_light_and_needs_neither_triton_nor_cuda_nor_a_process_group():
    seconds = []
    while not seconds or (min(seconds) >= 0.3 and len(seconds) < 3):
        seconds.append(seconds_to_import())
    assert min(seconds) < 0.3, seconds
