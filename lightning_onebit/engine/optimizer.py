"""The compressed optimizer step: an optimizer's gradients through the pipeline, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_onebit.comm.compressed_allreduce import error_dtype
from lightning_onebit.comm.exchanger import AnyLane, InlineLane
from lightning_onebit.comm.groups import ExchangeGroups, flat_groups
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.consistency.step import Consensus
from lightning_onebit.engine.clipping import NormSketch
from lightning_onebit.engine.flat import all_finite, flat_gradient, flat_view, unflatten_like
from lightning_onebit.engine.frozen import Replicated
from lightning_onebit.engine.pipeline import Pipeline
from lightning_onebit.engine.runs import Run
from lightning_onebit.methods import method_for, parameters_of


class CompressedOptimizer:
    """Steps an optimizer in the compressed phase, from local gradients in ``p.grad``, with the same result on every rank.

    Creating it freezes the optimizer's state: the second moment for good, while the momentum moves into the
    pipeline and its memory is freed (``state["exp_avg"]`` is gone until :meth:`thaw_`). ``optimizer.state_dict()``
    stays that of a stock optimizer all the same. ``p.grad`` is only read.

    Args:
        optimizer: a supported optimizer (see :mod:`lightning_onebit.methods`), whose warm-up state is the same on all ranks.
        config: settings of the compression.
        communicator: the ranks that train together. With one rank nothing is quantized.
        names: parameter names for messages.
        groups: the same ranks, on the process groups of ``lane``; without, all exchange on that of ``communicator``.
        lane: where compressed exchanges are carried out.
        overlap: whether :meth:`gradients_ready` will be called during backward.

    Raises:
        ValueError: if the optimizer is not supported, or its second moment is not finite.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: CompressionConfig,
        communicator: Communicator,
        names: Mapping[Tensor, str],
        *,
        groups: ExchangeGroups | None = None,
        lane: AnyLane | None = None,
        overlap: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.communicator = communicator
        self._names = names
        method_type = method_for(optimizer)
        check_second_moments(optimizer, names)
        self._steps = int(max((float(state["step"]) for state in optimizer.state.values()), default=0))

        self._overlap = overlap and communicator.world_size > 1
        # Reversed: roughly the order in which backward produces gradients. What was frozen all the time has no state, and
        # is to cost neither memory nor bytes.
        placed = [
            (group, p)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad or optimizer.state.get(p)
        ][::-1]
        kinds = sorted({(error_dtype(p.dtype), p.device) for _, p in placed}, key=str)
        self._pipelines = [
            Pipeline(
                optimizer=optimizer,
                placed=[(group, p) for group, p in placed if (error_dtype(p.dtype), p.device) == (dtype, device)],
                method_type=method_type,
                config=config,
                communicator=communicator,
                groups=groups or flat_groups(communicator),
                lane=lane or InlineLane(),
                overlap=self._overlap,
                dtype=dtype,
                device=device,
            )
            for dtype, device in kinds
        ]
        known = {p for _, p in placed}
        self._group_of = {p: index for p, index in _group_indices(optimizer).items() if p in known}
        self._order = [(pipeline, members) for pipeline in self._pipelines for members in pipeline.bucket_parameters]
        self._anticipated = 0
        self._arrived: set[Tensor] = set()
        self.consensus = Consensus(optimizer, self._parameters, communicator, names, self._device)
        self._handle = optimizer.register_state_dict_post_hook(lambda _, state_dict: self._complete(state_dict))

    def added_parameters(self) -> list[Tensor]:
        """Those that are trained since the optimizer's state was frozen, but were not before."""
        return [p for p in parameters_of(self.optimizer) if p.requires_grad and p not in self._group_of]

    @property
    def codec_names(self) -> set[str]:
        """Of the quantizers in use."""
        return {pipeline.codec_name for pipeline in self._pipelines}

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
        while self._anticipated < len(self._order):
            pipeline, members = self._order[self._anticipated]
            if any(p.requires_grad and p not in self._arrived for p in members):
                break
            self._anticipate_next_(pipeline)

    @torch.no_grad()
    def step(self, *, skip: bool = False) -> bool:
        """Compress, exchange, apply (steps 1 to 6 of the algorithm). Collective.

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
        if self._overlap:
            # Whatever this rank has heard of its gradients: all ranks exchange all buckets, or none would know what to do.
            for pipeline, _ in self._order[self._anticipated :]:
                self._anticipate_next_(pipeline)
            self._anticipated = 0
            self._arrived.clear()
        with record_function("onebit::agree"):
            finite, active = self._agree(skip=skip)
        self._check_same_parameters()
        self.communicator.counters.steps += 1
        for pipeline in self._pipelines:
            if finite:
                pipeline.step([active[p] for p in pipeline.parameters])
            elif self._overlap:
                pipeline.take_back()
        self._steps += finite
        if finite:
            self.consensus.forget_nonfinite()
        else:
            self.consensus.note_nonfinite()
        return finite

    @torch.no_grad()
    def spread_nonfinite_(self) -> None:
        """If a gradient is infinite or NaN on any rank, put an infinity into one gradient of every rank. Collective.

        So do averaged gradients under DDP: whoever inspects gradients for infinities decides alike on all ranks. For the
        same reason a rank without any gradient gets one of zeros if another rank has one.
        """
        finite, active = self._agree()
        if not finite:
            self.consensus.note_nonfinite()
        p = next((p for p, is_active in active.items() if is_active and p.numel()), None)
        if p is None:
            return
        if not any(p.grad is not None for p in active) or (not finite and p.grad is None):
            p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)
        if not finite:
            assert p.grad is not None
            p.grad.fill_(torch.inf)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the local gradients so that the norm of their mean over the ranks is at most ``max_norm``. Collective.

        As ``torch.nn.utils.clip_grad_norm_`` does under DDP, but with the norm estimated by a sketch (within about 1%),
        as no rank has the mean. All ranks use the same coefficient. A single rank computes the norm exactly.

        Returns:
            The norm before clipping, 0-d, the same on all ranks.
        """
        params = parameters_of(self.optimizer)
        with_gradient = [p for p in params if p.grad is not None]
        if self.communicator.world_size == 1:
            norm = get_total_norm([p.grad for p in with_gradient if p.grad is not None])
        else:
            sketch = NormSketch(seed=self._steps, device=self._device)  # the step: a resumed run draws the same
            sketch.add_([p.grad for p in params], [p.numel() for p in params])
            self.communicator.all_reduce_mean_(sketch.buckets)
            norm = sketch.norm()
        # A norm that is NaN would make NaN of all gradients, and hide where it came from. Divided by infinity, only what is
        # not finite becomes NaN.
        clip_grads_with_norm_(with_gradient, max_norm, norm.nan_to_num(nan=torch.inf, posinf=torch.inf))
        return norm

    @torch.no_grad()
    def outstanding(self) -> dict[Tensor, Tensor]:
        """Per parameter, what has not been applied yet: mean worker error plus server error. Collective.

        In the space that is communicated, float32 or float64, shape of the parameter, the same on all ranks. Zero where
        nothing was ever quantized (one rank).
        """
        return {p: error for pipeline in self._pipelines for p, error in pipeline.outstanding().items()}

    # What a checkpoint holds beside the stock state: see :class:`~lightning_onebit.engine.frozen.FrozenParameters`

    def holds(self, p: Tensor) -> bool:
        """Whether the state of ``p`` is frozen here."""
        return p in self._group_of

    def worker_errors(self) -> list[Run]:
        """This rank's worker errors, views. With one rank, which has none: u."""
        return [run for pipeline in self._pipelines for run in pipeline.worker_errors()]

    def server_errors(self) -> list[Run]:
        """The server errors of what this rank serves, views."""
        return [run for pipeline in self._pipelines for run in pipeline.server_errors()]

    def private_variances(self) -> tuple[Tensor, Tensor]:
        """Second moments that this rank alone knows: places as of a :class:`Run`, int64, rising, and copies of them."""
        places, values = zip(*(p.private_variances() for p in self._pipelines), strict=True) if self._pipelines else ([], [])
        all_places = torch.cat([*(each.cpu() for each in places), torch.zeros(0, dtype=torch.int64)])
        order = all_places.argsort()
        return all_places[order], torch.cat([*(each.cpu().double() for each in values), torch.zeros(0).double()])[order]

    def set_private_variances_(self, places: Tensor, values: Tensor) -> None:
        """Take them over from an earlier run."""
        for pipeline in self._pipelines:
            pipeline.set_private_variances_(places, values)

    def shared_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Per parameter, what all ranks know and a stock state dict does not tell exactly."""
        return {p: entry for pipeline in self._pipelines for p, entry in pipeline.shared_state().items()}

    def restore_(self, shared: Mapping[Tensor, Mapping[str, Tensor]], *, block_size: int) -> None:
        """Take over :meth:`shared_state` from an earlier run, whose blocks had ``block_size`` elements.

        Raises:
            ValueError: if it does not fit the parameters.
        """
        for pipeline in self._pipelines:
            pipeline.restore_(shared, block_size=block_size)

    @torch.no_grad()
    def add_errors_(self, worker: Sequence[Run], server: Sequence[Run]) -> None:
        """Add errors of an earlier run to those that this rank has in the same places.

        A single rank, which has none, applies them at once.
        """
        for pipeline in self._pipelines:
            pipeline.add_errors_(worker, server)

    def add_momentum_(self, momentum: Sequence[Run]) -> None:
        """Take over :meth:`worker_errors` of a single rank, on a single rank."""
        for pipeline in self._pipelines:
            pipeline.add_momentum_(momentum)

    def replicated_state(self) -> Iterator[tuple[Tensor, Replicated, Iterable[Tensor]]]:
        """Parameter by parameter, tensors that must be the same on all ranks; to be read one by one before the next step."""
        for pipeline in self._pipelines:
            yield from pipeline.replicated_state()

    @torch.no_grad()
    def thaw_(self) -> None:
        """Give the optimizer its own state back and apply what is outstanding. Collective; the object is spent then.

        Gradients that still wait for a step become their mean over the ranks, as DDP would have left them.
        """
        self._average_gradients_()
        outstanding = self.outstanding()
        for pipeline in self._pipelines:
            pipeline.thaw_(outstanding)
        self.close()

    @torch.no_grad()
    def retire_(self) -> None:
        """Give the optimizer its own state back without what is outstanding; the object is spent then. Not collective."""
        for pipeline in self._pipelines:
            pipeline.thaw_({})
        self.close()

    @property
    def _device(self) -> torch.device:
        return self._pipelines[0].device if self._pipelines else torch.device("cpu")

    def _anticipate_next_(self, pipeline: Pipeline) -> None:
        pipeline.anticipate_()
        self._anticipated += 1

    def close(self) -> None:
        """Take the hook off the optimizer's ``state_dict``, without touching its state."""
        self._handle.remove()

    def _complete(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Make a state dict what a stock optimizer would have written at this step."""
        stock: dict[Tensor, dict[str, Tensor]] = {}
        for pipeline in self._pipelines:
            stock.update(pipeline.stock_state())
        params = parameters_of(self.optimizer)
        state = {index: {**entry, **stock.get(params[index], {})} for index, entry in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def _agree(self, *, skip: bool = False) -> tuple[bool, dict[Tensor, bool]]:
        """Whether all gradients of all ranks are finite and none wants to skip; which parameters have one on any rank."""
        if self._overlap:
            finite = all(pipeline.all_finite for pipeline in self._pipelines)
        else:
            finite = all_finite([p.grad for p in self._parameters if p.grad is not None])
        return self.consensus.reach(skip=skip or not finite, changed=self._changed_parameters())

    def _changed_parameters(self) -> list[Tensor]:
        now = _group_indices(self.optimizer)
        return [*self.added_parameters(), *(p for p, index in self._group_of.items() if now.get(p) != index)]

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for pipeline in self._pipelines for p in pipeline.parameters]

    def _average_gradients_(self) -> None:
        _, active = self._agree()
        for p in (p for p, is_active in active.items() if is_active):
            gradient = flat_gradient(p)
            mean = flat_view(torch.zeros_like(p)) if gradient is None else gradient
            self.communicator.all_reduce_mean_(mean)
            p.grad = unflatten_like(mean, p)

    def _check_same_parameters(self) -> None:
        if self._changed_parameters():
            raise RuntimeError(
                "The optimizer's parameters have changed since the second moment was frozen; new ones have none."
                " HINT: call `strategy.resume_warmup()` before adding parameters, and freeze again later."
            )


def check_second_moments(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError`` if a second moment is infinite or NaN: such a warm-up cannot go on compressed."""
    diverged = [repr(names.get(p, "a parameter")) for p in diverged_parameters(optimizer)]
    if diverged:
        more = f" and {len(diverged) - 3} more" if len(diverged) > 3 else ""
        raise ValueError(
            f"Cannot freeze: the second moment of {', '.join(diverged[:3])}{more} holds infinite or NaN values, so the"
            " warm-up has already diverged, as it would under plain DDP. HINT: resume from an earlier checkpoint with a"
            " smaller learning rate or with gradient clipping."
        )


def diverged_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Those whose second moment is infinite or NaN somewhere, and will stay so."""
    return [
        p for p, state in optimizer.state.items() if "exp_avg_sq" in state and not torch.isfinite(state["exp_avg_sq"]).all()
    ]


def _group_indices(optimizer: Optimizer) -> dict[Tensor, int]:
    return {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
