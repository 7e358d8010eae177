"""The compressed optimizer step: an optimizer's gradients through the compressed all-reduce, bucket by bucket.

One formula serves every method (1-bit Adam, arXiv 2102.02888, algorithm 1; 1-bit SGD, Seide et al. 2014):

    1.  c_i = e_i + beta u + w clamp(g_i / D, +-kappa)      local momentum, preconditioned
    2.  q_i = C(c_i);   e_i = c_i - q_i                     worker compression, error kept locally
    3.  exchange q_i by all-to-all                          every rank is the server of its own 1/n of the blocks
    4.  c_bar = mean_i(q_i) + s;   u = (1 + beta / 2) C(c_bar);   s = c_bar - u      on the server; error kept by the owner
    5.  all-gather u                                        every rank now has the same u, bit for bit
    6.  x = a x - eta u
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_onebit.comm.compressed_allreduce import exchange_
from lightning_onebit.comm.exchanger import Exchange, Exchanger, InlineExchanger
from lightning_onebit.comm.groups import ExchangeGroups, flat_groups
from lightning_onebit.comm.hierarchical import NodeAverage
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.consistency.agreement import RanksDisagree
from lightning_onebit.consistency.step import Outcome, StepAgreement
from lightning_onebit.engine.buckets import Buckets
from lightning_onebit.engine.clipping import NormSketch, clip_buckets_, norm_of_buckets, sketch_numel
from lightning_onebit.engine.compressed_state import CompressedState
from lightning_onebit.engine.frozen_state import FrozenState
from lightning_onebit.engine.parameter_set import ParameterSet
from lightning_onebit.engine.variance import REFRESH_STEPS, first_gradients_
from lightning_onebit.flat import all_finite, flat_gradient, flat_view, unflatten_like
from lightning_onebit.freeze.drift import Drift
from lightning_onebit.methods import method_for, parameters_of
from lightning_onebit.refresh_schedule import COLLECTING_STEPS, SKETCH_STEPS, is_refresh_due


class CompressedOptimizer:
    """Steps an optimizer in the compressed phase, from local gradients in ``p.grad``, with the same result on every rank.

    Creating it moves the optimizer's state into flat buckets and freezes the second moment: ``optimizer.state`` is empty
    until :meth:`give_back_`. ``optimizer.state_dict()`` stays that of a stock optimizer all the same. ``p.grad`` is only
    read.

    Args:
        optimizer: a supported optimizer (see :mod:`lightning_onebit.methods`), whose warm-up state is the same on all ranks.
        config: settings of the compression.
        communicator: the ranks that train together. With one rank nothing is quantized.
        names: parameter names for messages.
        groups: the same ranks, on the process groups of ``exchanger``; without, all exchange on that of ``communicator``.
        exchanger: where compressed exchanges are carried out.
        overlap: whether :meth:`gradients_ready` will be called during backward.

    Raises:
        ValueError: if the optimizer is not supported, or its momentum or second moment is not finite.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: CompressionConfig,
        communicator: Communicator,
        names: Mapping[Tensor, str],
        *,
        groups: ExchangeGroups | None = None,
        exchanger: Exchanger | None = None,
        overlap: bool = False,
    ) -> None:
        self.optimizer, self.method, self.communicator = optimizer, method_for(optimizer), communicator
        self._names, self._config = names, config
        self._groups = groups or flat_groups(communicator)
        self._exchanger = exchanger or InlineExchanger()
        self._overlap = overlap and communicator.world_size > 1
        check_moments(optimizer, names)
        # Reversed: roughly the order in which backward produces gradients. What was frozen all the time has no state, and
        # is to cost neither memory nor bytes.
        params = [p for p in parameters_of(optimizer) if p.requires_grad or optimizer.state.get(p)][::-1]
        looks_ahead = any(self.method.coefficients(g, 1, num_averaged=1).nesterov for g in optimizer.param_groups)
        self._sets = [
            ParameterSet(
                Buckets(
                    optimizer,
                    self.method,
                    [p for p in params if (str(p.dtype), str(p.device)) == kind],
                    config,
                    self._groups,
                    keeps_before=self._overlap or looks_ahead,
                ),
                self._groups,
            )
            for kind in sorted({(str(p.dtype), str(p.device)) for p in params})
        ]
        self._params = [p for each in self._sets for p in each.buckets.params]
        self._queue = [(each, index) for each in self._sets for index in range(len(each.buckets.memories))]
        known = set(self._params)
        self._param_group_of = {p: i for p, i in _param_group_indices(optimizer).items() if p in known}
        self._ids_of_groups = _ids_of_groups(optimizer)
        if not self._groups.topology.is_flat:
            for each in self._sets:
                each.node_average = NodeAverage(each.buckets.memories, self._groups)
        # Errors must not change before all ranks know that the step counts. On a GPU nobody waits for that: the kernels of
        # step 6 look it up.
        self._commits_late = self._overlap or any(each.buckets.kernels.reads_flags_on_device for each in self._sets)
        self._knows_live = self.method.has_second_moment or communicator.world_size == 1
        self._learns_live = False
        self._sent: deque[tuple[ParameterSet, int, Exchange]] = deque()
        self._waited: list[Exchange] = []
        """Exchanges that were waited for, for how long has not been counted yet."""
        self._num_sent = 0
        self._arrived: set[Tensor] = set()
        self.agreement = StepAgreement(optimizer, self._params, communicator, names, self._device)
        self.last_outcome: Outcome | None = None
        """What the ranks have told each other with the last step."""
        optimizer.state = self._frozen_state = FrozenState(dict, optimizer.state)
        self._handle = optimizer.register_state_dict_post_hook(lambda _, state_dict: self._complete(state_dict))

    @cached_property
    def state(self) -> CompressedState:
        """What it holds, for checkpoints and for another compressed phase."""
        return CompressedState(self.optimizer, self._sets, self.communicator, self._groups)

    def restore_(self, shared: Mapping[Tensor, Mapping[str, Tensor]], *, block_size: int) -> None:
        """Take over ``state.shared_state()`` from an earlier run, whose blocks had ``block_size`` elements.

        Raises:
            ValueError: if it does not fit the parameters.
        """
        self.state.restore_(shared, block_size=block_size)
        # Without D, who is live is known from the first average on; a single rank does not ask.
        self._knows_live = (
            self.method.has_second_moment
            or self.communicator.world_size == 1
            or any("live" in entry or ("scales" in entry and bool(entry["scales"].any())) for entry in shared.values())
        )

    def added_parameters(self) -> list[Tensor]:
        """Those that are trained since the optimizer's state was frozen, but were not before."""
        return [p for p in parameters_of(self.optimizer) if p.requires_grad and p not in self._param_group_of]

    @property
    def state_was_replaced(self) -> bool:
        """Whether user code has replaced or cleared ``optimizer.state``, by ``load_state_dict`` for instance."""
        return self.optimizer.state is not self._frozen_state or self._frozen_state.was_cleared or bool(self._frozen_state)

    @property
    def has_begun_a_step(self) -> bool:
        """Whether gradients of the next step have been sent during backward."""
        return bool(self._arrived) or self._num_sent > 0

    @property
    def kernel_names(self) -> set[str]:
        """Of the quantizers in use."""
        return {each.buckets.kernels.name for each in self._sets}

    @torch.no_grad()
    def gradients_ready(self, params: Iterable[Tensor]) -> None:
        """Start to send buckets whose gradients are all there. Call during backward, when those of ``params`` are final.

        Buckets go in the same order on all ranks, whatever the order of the calls.

        Raises:
            RuntimeError: at a second backward before the next step.
        """
        if not self._overlap:
            return
        arrived = set(params)
        again = arrived & self._arrived
        if again:
            raise RuntimeError(
                f"The gradient of {self._names.get(again.pop(), 'a parameter')!r} came a second time before the optimizer"
                " stepped, when the first may have been sent. HINT: use overlap=False."
            )
        self._arrived |= arrived
        while self._knows_live and self._num_sent < len(self._queue):
            each, index = self._queue[self._num_sent]
            members = [each.buckets.params[i] for i in each.buckets.parameters_of_bucket[index]]
            if any(p.requires_grad and p not in self._arrived for p in members):
                break
            self._send_(each, index)

    @torch.no_grad()
    def step(self, *, skip: bool = False) -> bool:
        """Compress, exchange, apply: steps 1 to 6 of the algorithm. Collective.

        A parameter without gradient on every rank sits out, as under torch's optimizers; without gradient on some, it
        counts as zero there.

        Args:
            skip: whether this rank wants the step to be skipped whatever the gradients are.

        Returns:
            False if the step was skipped on all ranks, with all state untouched, because a gradient was infinite or NaN
            on one of them, or one of them wanted it.

        Raises:
            RanksDisagree: on all ranks, if settings of the optimizer, which schedulers may have changed, are not the same.
            RuntimeError: if the optimizer has other parameters than when it was frozen.
        """
        outcome, changed = None, self._changed_parameters()
        if not self._commits_late:
            outcome = self._agree(skip=skip or not self._all_finite(), changed=changed)
            if changed:
                self._refuse(changed)
        elif not self._knows_live:
            self._learn_live_()
        if outcome is None or outcome.counts:
            for each, index in self._queue[self._num_sent :]:
                self._send_(each, index, counts=outcome)  # steps 1 to 5
                while outcome is not None and self._sent and self._sent[0][2].done():
                    self._finish_(*self._sent.popleft())  # step 6, while others travel
        if self._commits_late:
            # Other parameters than at the freeze stop the step for all ranks, and are refused when these have agreed.
            words = self._agree_on_device(skip=skip or bool(changed), changed=changed)
            outcome = None if self._waits_last else self._read(words)
        while self._sent:
            self._finish_(*self._sent.popleft())
        estimates: dict[ParameterSet, Tensor] = {}
        if outcome is None:
            estimates = self._estimate()
            outcome = self._read(words, list(estimates.values()))
        self._end_step_(outcome, dict(zip(estimates, outcome.beside, strict=True)))
        if changed:
            self._refuse(changed)
        return outcome.counts

    def _read(self, words: Tensor, beside: Sequence[Tensor] = ()) -> Outcome:
        """Wait for what the ranks have told each other; if they disagree, nothing of the step remains."""
        try:
            return self.agreement.read(words, beside)
        except RanksDisagree:
            while self._sent:
                self._sent.popleft()[2].wait()
            self._take_back_()
            raise

    def _send_(self, each: ParameterSet, index: int, *, counts: Outcome | None = None) -> None:
        """Steps 1 to 5 for one bucket; errors change only if it is known that the step ``counts``."""
        buckets, commit = each.buckets, counts is not None
        memory, step = buckets.memories[index], each.step_inputs(self._groups.topology.num_nodes)
        each.take_gradients_(index)
        if counts is not None:
            each.set_active_(counts, self._params)
        if each.node_average is not None:  # hierarchical: g_i is the mean of this node
            with record_function("onebit::node_average"):
                needed_later = counts is None or self._looks_back(each, index, counts)
                each.average_inside_node_(index, keep=needed_later)
        with record_function("onebit::encode"):  # steps 1 and 2
            buckets.kernels.encode_(memory, index, step, commit=commit)
            if commit and each.late:
                each.late[index].collect_(index, step)
        if buckets.is_quantized:  # steps 3 to 5
            serve = partial(buckets.server_kernels.serve_, memory, step, commit=commit)
            work = partial(exchange_, memory, self._groups, serve)
            self._sent.append((each, index, self._exchanger.submit(work)))
        else:
            self._sent.append((each, index, InlineExchanger().submit(lambda: None)))
        self._num_sent += 1

    def _finish_(self, each: ParameterSet, index: int, exchange: Exchange) -> None:
        """Step 6 for one bucket, once its new average is there."""
        with record_function("onebit::wait"):
            exchange.wait()
        self._waited.append(exchange)
        with record_function("onebit::apply"):
            memory, step = each.buckets.memories[index], each.step_inputs(self._groups.topology.num_nodes)
            each.buckets.kernels.apply_(memory, index, step, commit=self._commits_late)

    def _estimate(self) -> dict[ParameterSet, Tensor]:
        """Launch what second moments need to know of the step, by which nothing changes yet: it is read when all is."""
        number, estimates = self._steps + 1, {}
        with record_function("onebit::sketch"), self.communicator.counters.counting_sketches():
            for each in self._sketched_sets:
                estimate = each.estimate(number)
                if estimate is not None:
                    estimates[each] = estimate
        return estimates

    def _end_step_(self, outcome: Outcome, learned: Mapping[ParameterSet, NDArray[np.float32]]) -> None:
        """Count the step, or take it back; renew second moments, if it is time."""
        self.last_outcome = outcome
        self.communicator.counters.steps += 1
        self._count_waits()
        if self._learns_live and not outcome.counts:
            self._forget_live_()
        self._learns_live = False
        for each in self._sets:
            each.set_active_(outcome, self._params)
        if outcome.counts:
            self._renew_(learned, has_news=outcome.has_news)
            self._forget_step_()
            self.agreement.forget_nonfinite()
        else:
            self._take_back_()
            self.agreement.note_nonfinite()

    def _renew_(self, learned: Mapping[ParameterSet, NDArray[np.float32]], *, has_news: bool) -> None:
        """Count the step, and let D follow the second moment where it is time: valid from the next step on.

        Args:
            learned: what has been estimated already, and brought to the host with the outcome.
            has_news: whether some rank asks for a refresh.
        """
        number, counters = self._steps + 1, self.communicator.counters
        late_is_due, sketched = has_news and self._is_late_refresh_due, self._sketched_sets
        for each in self._sets:
            each.count_step_(late=self._commits_late)
            if each in learned:
                each.statistics.take_over_(learned[each])
            elif each in sketched:
                with record_function("onebit::sketch"), counters.counting_sketches():
                    each.learn_(number)
        collected_steps = max((int(each.buckets.collected_steps.max(initial=0)) for each in self._sets), default=0)
        for each in self._sets:
            with record_function("onebit::refresh"), counters.counting_refreshes():
                if late_is_due and each.late:
                    each.refresh_late_(self._groups)
                is_due = each.buckets.renews and is_refresh_due(number, self._config.variance_refresh)
                if is_due or (each.buckets.is_collecting and collected_steps >= COLLECTING_STEPS):
                    each.refresh_(self._groups)

    def _looks_back(self, each: ParameterSet, index: int, outcome: Outcome) -> bool:
        """Whether the gradients of a bucket are looked at again at the end of the step."""
        if each in self._sketched_sets:
            return True
        return outcome.has_news and self._is_late_refresh_due and bool(each.late) and len(each.late[index]) > 0

    def _count_waits(self) -> None:
        """On a GPU the last ones may still be in progress; they are counted with the next step."""
        unknown = []
        for exchange in self._waited:
            seconds = exchange.seconds()
            if seconds is None:
                unknown.append(exchange)
            else:
                waited, taken = seconds
                self.communicator.counters.seconds_waited += waited
                self.communicator.counters.seconds_exchanging += taken
        self._waited = unknown

    def _take_back_(self) -> None:
        """The step does not count: errors and parameters are as they were, averages become so."""
        for each, index in self._queue[: self._num_sent]:
            each.buckets.memories[index].turn_results_()
        self._forget_step_()

    def _forget_step_(self) -> None:
        for each in self._sets:
            each.forget_step_()
        self._num_sent = 0
        self._arrived.clear()

    # What ranks tell each other

    def _agree(self, *, skip: bool, changed: Sequence[Tensor]) -> Outcome:
        """Before anything is sent, in one small message."""
        with record_function("onebit::agree"):
            has_news = any(bool(flag) for flag in self._news())
            words = self.agreement.propose(skip=skip, has_news=has_news, changed=changed)
            self.agreement.share_(words)
            outcome = self.agreement.read(words)
        if outcome.counts:
            self._set_flags_(words)
            if not self._knows_live:
                self._learn_live_()
        return outcome

    def _agree_on_device(self, *, skip: bool, changed: Sequence[Tensor]) -> Tensor:
        """After everything is sent: kernels have noted in their flags whether gradients are finite."""
        with record_function("onebit::agree"):
            words = self.agreement.propose(skip=skip, has_news=False, changed=changed)
            self.agreement.add_(words, skip=[each.flags[:1] for each in self._sets], has_news=self._news())
            self.agreement.share_(words)
            self.agreement.stop_if_different_(words)
            self._set_flags_(words)
        return words

    def _set_flags_(self, words: Tensor) -> None:
        """Tell the kernels what the ranks have agreed on."""
        start = 1
        for each in self._sets:
            numel = len(each.buckets.params)
            each.flags[:1].copy_(words[:1])
            each.flags[1:].copy_(words[start : start + numel])
            start += numel

    def _news(self) -> list[Tensor]:
        """Where a refresh is due, whether each bucket has something to tell; int32 ``[1]``."""
        if not self._is_late_refresh_due:
            return []
        news = (late.has_news() for each in self._sets for late in each.late)
        return [flag.to(torch.int32).view(1) for flag in news if flag is not None]

    def _learn_live_(self) -> None:
        """Before the first step of a method without second moment."""
        self._knows_live = self._learns_live = True
        for each in self._sets:
            for index in range(len(each.buckets.memories)):
                each.step_inputs(self._groups.topology.num_nodes)
                each.take_gradients_(index)
            first_gradients_(each.buckets, each.gradients, self._groups)

    def _forget_live_(self) -> None:
        """The gradients that told it do not count: they may be infinite where there never was one."""
        self._knows_live = False
        for each in self._sets:
            for memory in each.buckets.memories:
                memory.live = memory.live_before = None

    @property
    def _is_late_refresh_due(self) -> bool:
        return (self._steps + 1) % REFRESH_STEPS == 0

    @property
    def _sketched_sets(self) -> list[ParameterSet]:
        """Those of whose present gradients something is learned: every 16 steps, and more often at first, if r is needed."""
        is_due = (self._steps + 1) % SKETCH_STEPS == 0
        return [each for each in self._sets if (is_due and each.is_sketched) or each.is_sketched_often]

    @property
    def _waits_last(self) -> bool:
        """Whether the host asks how the ranks have decided only when all of the step has been launched."""
        return all(each.buckets.kernels.reads_flags_on_device for each in self._sets) and bool(self._sets)

    @property
    def _steps(self) -> int:
        return max((int(each.buckets.steps.max(initial=0)) for each in self._sets), default=0)

    def _all_finite(self) -> bool:
        return all_finite([p.grad for p in self._params if p.grad is not None])

    @torch.no_grad()
    def spread_nonfinite_(self) -> None:
        """If a gradient is infinite or NaN on any rank, put an infinity into one gradient of every rank. Collective.

        So do averaged gradients under DDP: whoever inspects gradients for infinities decides alike on all ranks. For the
        same reason a rank without any gradient gets one of zeros if another rank has one.
        """
        words = self.agreement.propose(skip=not self._all_finite(), has_news=False, changed=self._changed_parameters())
        self.agreement.share_(words)
        outcome = self.agreement.read(words)
        if not outcome.counts:
            self.agreement.note_nonfinite()
        p = next((p for p, active in zip(self._params, outcome.active, strict=True) if active and p.numel()), None)
        if p is None:
            return
        if not any(p.grad is not None for p in self._params) or (not outcome.counts and p.grad is None):
            p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)
        if not outcome.counts:
            assert p.grad is not None
            p.grad.fill_(torch.inf)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the local gradients so that the norm of their mean over the ranks is at most ``max_norm``. Collective.

        As ``torch.nn.utils.clip_grad_norm_`` does under DDP, but with the norm estimated by a sketch, as no rank has the
        mean. All ranks use the same coefficient. A single rank computes the norm exactly.

        Returns:
            The norm before clipping, 0-d, the same on all ranks.
        """
        with_gradient = [p for p in parameters_of(self.optimizer) if p.grad is not None]
        if self._waits_last and self.communicator.world_size > 1:
            return clip_buckets_([each.buckets for each in self._sets], self.communicator, max_norm, seed=self._steps)
        norm = self.grad_norm()
        # A norm that is NaN would make NaN of all gradients, and hide where it came from. Divided by infinity, only what is
        # not finite becomes NaN.
        clip_grads_with_norm_(with_gradient, max_norm, norm.nan_to_num(nan=torch.inf, posinf=torch.inf))
        return norm

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The norm of the mean of the local gradients, 0-d, the same on all ranks, estimated by a sketch. Collective.

        A single rank computes it exactly.
        """
        params = parameters_of(self.optimizer)
        if self.communicator.world_size == 1:
            return get_total_norm([p.grad for p in params if p.grad is not None])
        if self._waits_last:
            return norm_of_buckets([each.buckets for each in self._sets], self.communicator, seed=self._steps)
        # The step is the seed: a resumed run draws the same.
        sketch = NormSketch(seed=self._steps, device=self._device, numel=sketch_numel(sum(p.numel() for p in params)))
        sketch.add_([p.grad for p in params], [p.numel() for p in params])
        with self.communicator.counters.counting_sketches():
            self.communicator.all_reduce_mean_(sketch.buckets)
        return sketch.norm()

    def variance_drift(self) -> dict[Tensor, Drift]:
        """By parameter, how well D fits the gradients, by the estimates so far; empty without D. Not collective."""
        found: dict[Tensor, tuple[float, float, float, float, int]] = {}
        for each in self._sets:
            if each.is_sketched:
                found.update(zip(each.buckets.params, each.statistics.drift, strict=True))
        elements = sum(n for _, _, n, _, _ in found.values()) or 1.0
        squares = sum(ratio * n for ratio, _, n, _, _ in found.values()) or 1.0
        return {
            p: Drift(ratio, clamped, max(n / elements, ratio * n / squares), last, estimates)
            for p, (ratio, clamped, n, last, estimates) in found.items()
        }

    @torch.no_grad()
    def error_over_update(self) -> float:
        """Norm of this rank's worker errors over that of u, of its share; NaN where u is 0. Not collective.

        Reads all errors once. Waits for the device.
        """
        norms = [each.buckets.squared_norms(memory) for each in self._sets for memory in each.buckets.memories]
        error, update = (sum(column) for column in zip((0.0, 0.0), *norms, strict=True))
        return math.sqrt(error / update) if self.communicator.world_size > 1 and update > 0 else math.nan

    @torch.no_grad()
    def refresh_variance_(self) -> None:
        """Renew D from the second moments of all ranks, where these go on: valid from the next step on. Collective.

        Where they do not, in update space, begin to collect them (or begin anew): D is renewed at the end of the 16th step.
        """
        with record_function("onebit::refresh"), self.communicator.counters.counting_refreshes():
            for each in self._sets:
                if each.buckets.renews:
                    each.refresh_(self._groups)
                elif each.buckets.can_collect:
                    each.buckets.collect_()

    @property
    def is_collecting(self) -> bool:
        """Whether second moments are being collected for a refresh."""
        return any(each.buckets.is_collecting for each in self._sets)

    def holds(self, p: Tensor) -> bool:
        """Whether the state of ``p`` is frozen here."""
        return p in self._param_group_of

    @torch.no_grad()
    def give_back_(self) -> None:
        """Give the optimizer its own state back; the object is spent then. Not collective.

        What error feedback holds is in ``state.waiting_errors()``, to be asked for before.
        """
        self._free_state_()
        self.state.give_back_()
        self.close()

    def close(self) -> None:
        """Take the hook off the optimizer's ``state_dict``, without touching its state."""
        self._handle.remove()
        self._free_state_()

    def _free_state_(self) -> None:
        """``optimizer.state`` is that of a stock optimizer again."""
        if self.optimizer.state is self._frozen_state:
            self.optimizer.state = defaultdict(dict, self._frozen_state)

    @property
    def _device(self) -> torch.device:
        return self._sets[0].buckets.device if self._sets else torch.device("cpu")

    def _complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Make a state dict what a stock optimizer would have written at this step. What user code has put here is that."""
        if self.state_was_replaced:
            return state_dict
        position = {p: index for index, p in enumerate(parameters_of(self.optimizer))}
        state = dict(state_dict["state"])
        for p, entry in self.state.stock_state().items():
            state[position[p]] = entry
        return {**state_dict, "state": dict(sorted(state.items()))}

    def _changed_parameters(self) -> list[Tensor]:
        ids = _ids_of_groups(self.optimizer)
        if ids == self._ids_of_groups and sum(map(len, ids)) == len(self._param_group_of):  # at nearly every step, and cheap
            return []
        now = _param_group_indices(self.optimizer)
        return [*self.added_parameters(), *(p for p, index in self._param_group_of.items() if now.get(p) != index)]

    def _refuse(self, changed: Sequence[Tensor]) -> None:
        now = _param_group_indices(self.optimizer)
        what: dict[str, list[str]] = {"new": [], "removed": [], "moved to another group": []}
        for p in changed:
            how = "new" if p not in self._param_group_of else "moved to another group" if p in now else "removed"
            what[how].append(self._names.get(p, f"one of shape {tuple(p.shape)}"))
        raise RuntimeError(
            "The optimizer's parameters have changed since the second moment was frozen:"
            f" {'; '.join(f'{how}: {_first_of(names)}' for how, names in what.items() if names)}. State is kept for"
            " those of then, group by group. HINT: call `strategy.resume_warmup()` before adding, removing or moving"
            " parameters, and freeze again later. To train some no longer, `requires_grad_(False)` is enough."
        )

    @torch.no_grad()
    def average_gradients_(self) -> None:
        """Local gradients that wait for a step become their mean over the ranks. Collective."""
        words = self.agreement.propose(skip=False, has_news=False, changed=self._changed_parameters())
        self.agreement.share_(words)
        for p, active in zip(self._params, self.agreement.read(words).active, strict=True):
            if active:
                gradient = flat_gradient(p)
                mean = flat_view(torch.zeros_like(p)) if gradient is None else gradient
                self.communicator.all_reduce_mean_(mean)
                p.grad = unflatten_like(mean, p)


def check_moments(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError`` if a second moment or momentum is infinite or NaN: such a warm-up cannot go on compressed."""
    diverged = [repr(names.get(p, "a parameter")) for p in diverged_parameters(optimizer)]
    if diverged:
        more = f" and {len(diverged) - 3} more" if len(diverged) > 3 else ""
        raise ValueError(
            f"Cannot freeze: the momentum or second moment of {', '.join(diverged[:3])}{more} holds infinite or NaN values,"
            " so the warm-up has already diverged, as it would under plain DDP. HINT: resume from an earlier checkpoint with"
            " a smaller learning rate or with gradient clipping."
        )


def diverged_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Those whose momentum or second moment is infinite or NaN somewhere, and will stay so."""
    method = method_for(optimizer)
    diverged = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            moments = [m for m in (method.momentum(state), method.second_moment(state, group)) if m is not None]
            if not all_finite(moments):
                diverged.append(p)
    return diverged


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _ids_of_groups(optimizer: Optimizer) -> list[list[int]]:
    """Of the parameters of each group."""
    return [list(map(id, group["params"])) for group in optimizer.param_groups]


def _param_group_indices(optimizer: Optimizer) -> dict[Tensor, int]:
    return {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
