"""The seam between methods and everything else: nobody but ``methods/`` knows an optimizer's type, or what its state is."""

import ast
import functools

import pytest
import torch
from test_architecture import ROOT, sources
from torch import nn

from lightning_onebit.coefficients import LARGEST_VALUE
from lightning_onebit.engine.optimizer import diverged_parameters
from lightning_onebit.lightning.callbacks.phase_switch import largest_learning_rate, slowest_beta2
from lightning_onebit.lightning.gradient_ratios import gradient_ratios
from lightning_onebit.methods import counted_steps, hyperparameters, method_for, needs_warmup

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
        if module.split(".")[0] not in ("methods", "doctor")  # which times a stock optimizer
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
    assert diverged_parameters(sgd) == [module.weight]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.9)])
def test_what_a_move_may_be_in_momentum_space_is_the_largest_of_an_adam(betas):
    """With gradients that grow as (beta2 / beta1)^t, those for which Cauchy and Schwarz have equality, Adam reaches it."""
    (beta1, beta2), steps, lr = betas, 300, 0.5
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=lr, betas=betas, eps=0.0)
    for step in range(steps):
        p.grad = torch.tensor((beta2 / beta1) ** (step - steps), dtype=torch.float64)
        before = p.detach().clone()
        adam.step()
    numbers = method_for(adam).coefficients(adam.param_groups[0], steps, num_averaged=8)
    correction = (1 - beta2**steps) ** 0.5  # that of v: 0.51 after 300 steps with 0.999
    assert float((p.detach() - before).abs()) == pytest.approx(numbers.largest_move * correction, rel=1e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.81), (0.95, 0.9), (0.9, 0.0)])
def test_where_adam_has_no_bound_a_move_is_as_large_as_a_single_gradient_may_be(betas):
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(()))], lr=1.0, betas=betas)
    numbers = method_for(adam).coefficients(adam.param_groups[0], 1000, num_averaged=8)
    assert numbers.largest_move == pytest.approx((1 - betas[1]) ** -0.5)
    adam.param_groups[0]["lr"] = 0.0
    assert method_for(adam).coefficients(adam.param_groups[0], 1000, num_averaged=8).largest_move == LARGEST_VALUE


class Labelled(torch.optim.AdamW):
    """Leaves ``step`` alone."""

    def __init__(self, params, label, **options):
        super().__init__(params, **options)
        self.label = label

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)


def steps_before(self, closure=None):
    return torch.optim.AdamW.step(self, closure)


@pytest.mark.parametrize("used_before", [False, True], ids=["first", "hooked"])
def test_a_subclass_with_the_stock_step_is_that_optimizer(used_before):
    module = nn.Linear(3, 2)
    kind = type("Fresh", (Labelled,), {})
    if used_before:  # torch wraps `step` of the class
        kind(module.parameters(), "a")
    assert type(method_for(kind(module.parameters(), "b"))).__name__ == "AdamWMethod"
    assert type(method_for(type("Mine", (torch.optim.SGD,), {})(module.parameters()))).__name__ == "SGDMethod"


@pytest.mark.parametrize(
    "overridden",
    [
        {"step": steps_before},
        {"step": functools.wraps(torch.optim.AdamW.step)(steps_before)},
        {"_init_group": lambda self, *args: torch.optim.AdamW._init_group(self, *args)},
    ],
    ids=["step", "wrapped", "groups"],
)
def test_a_subclass_with_another_step_is_refused_with_the_reason(overridden):
    kind = type("Mine", (Labelled,), overridden)
    for _ in range(2):
        optimizer = kind(nn.Linear(3, 2).parameters(), "a")
        with pytest.raises(ValueError, match=rf"Mine cannot be compressed: it has `{next(iter(overridden))}` of its own"):
            method_for(optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_ranks_compare_what_a_step_uses_and_nothing_else(kind):
    _, optimizer = stepped(kind, 1, lr=0.1)
    before = hyperparameters(optimizer)
    assert f"{kind.__name__}, group 0, lr" in before
    assert all(f"{kind.__name__}, group 0, {name}" in before for name in ("weight_decay", "maximize"))
    optimizer.param_groups[0] |= {"tokens": 17, "name": "rank 3", "seen": torch.tensor(5)}
    assert hyperparameters(optimizer) == before
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)  # a schedule on a device
    assert hyperparameters(optimizer) == before
    optimizer.param_groups[0]["lr"] = 0.2
    assert hyperparameters(optimizer) != before
