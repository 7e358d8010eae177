"""The seam between methods and everything else: nobody but ``methods/`` knows an optimizer's type, or what its state is."""

import ast

import pytest
import torch
from test_architecture import ROOT, sources
from torch import nn

from lightning_onebit.engine.optimizer import diverged_parameters
from lightning_onebit.lightning.callbacks.phase_switch import largest_learning_rate, slowest_beta2
from lightning_onebit.lightning.gradient_ratios import gradient_ratios
from lightning_onebit.methods import counted_steps, needs_warmup

FORBIDDEN_NAMES = {"AdamMethod", "AdamWMethod", "SGDMethod", "optimizer_types", "Adam", "AdamW", "SGD"}
FORBIDDEN_STRINGS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "betas", "momentum_buffer", "dampening", "amsgrad"}
"""Keys of stock state and of parameter groups that only one method has."""


def knowledge_of_methods(tree):
    """What a module should not know, and the line. Docstrings and texts that only mention a word are no keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_NAMES:
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.name.split(".")[-1] in FORBIDDEN_NAMES:
            yield node.lineno, node.name
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value in FORBIDDEN_STRINGS | FORBIDDEN_NAMES
        ):
            yield node.lineno, repr(node.value)


def test_no_other_module_asks_for_a_methods_type_or_state():
    found = {
        f"{module}:{line}": what
        for module, tree in sources().items()
        if module.split(".")[0] != "methods"
        for line, what in knowledge_of_methods(tree)
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "if isinstance(optimizer, torch.optim.SGD): pass",
        "if isinstance(optimizer, (Adam, str)): pass",
        "from torch.optim import AdamW as A",
        "from lightning_onebit.methods.sgd import SGDMethod",
        "type(optimizer) in method.optimizer_types",
        "type(optimizer).__name__ == 'SGD'",
        "beta2 = group['betas'][1]",
        "'exp_avg_sq' in state",
        "state.get('momentum_buffer')",
    ],
)
def test_knowledge_is_found_however_it_is_written(source):
    assert list(knowledge_of_methods(ast.parse(source)))


def test_a_method_is_a_small_file():
    for file in (ROOT / "methods").glob("*.py"):
        assert len(file.read_text().splitlines()) < (100 if file.name == "sgd.py" else 150), file


def stepped(kind, steps, **options):
    torch.manual_seed(0)
    module = nn.Linear(7, 5)
    optimizer = kind(module.parameters(), **options)
    for _ in range(steps):
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return module, optimizer


def test_sgd_has_no_second_moment_and_its_rate_counts_only_alone():
    module, sgd = stepped(torch.optim.SGD, 3, lr=0.5, momentum=0.9)
    other, adam = stepped(torch.optim.Adam, 3, lr=0.1)
    assert not needs_warmup(sgd)
    assert gradient_ratios(sgd) == {}
    assert set(gradient_ratios(adam)) == set(other.parameters())
    assert largest_learning_rate([sgd]) == 0.5
    assert largest_learning_rate([sgd, adam]) == 0.1
    assert (slowest_beta2([adam]), slowest_beta2([])) == (0.999, 0.0)
    assert slowest_beta2([sgd]) == 0.0
    assert slowest_beta2([sgd, adam]) == 0.999
    assert (counted_steps(sgd), counted_steps(adam)) == (None, 3)
    sgd.state[module.weight]["momentum_buffer"][0, 0] = torch.nan
    assert diverged_parameters(sgd) == []
