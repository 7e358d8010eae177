"""The compressed optimizer step: an optimizer's gradients through the pipeline, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_onebit.comm.allreduce import error_dtype
from lightning_onebit.comm.groups import ExchangeGroups, flat_groups
from lightning_onebit.comm.lane import AnyLane, InlineLane
from lightning_onebit.comm.primitives import Communicator
from lightning_onebit.config import CompressionConfig
from lightning_onebit.flat import all_finite
from lightning_onebit.optim import method_for
from lightning_onebit.pipeline import Pipeline
from lightning_onebit.sketch import NormSketch
from lightning_onebit.stats import DENSE_ELEMENT_NBYTES, ring_all_reduce_nbytes


class CompressedOptimizer:
    """Steps an optimizer in the compressed phase, from local gradients in ``p.grad``, with the same result on every rank.

    Creating it freezes the optimizer's state: the second moment for good, while the momentum moves into the
    pipeline and its memory is freed (``state["exp_avg"]`` is gone until :meth:`thaw_`). ``optimizer.state_dict()``
    stays that of a stock optimizer all the same. ``p.grad`` is only read.

    Args:
        optimizer: a supported optimizer (see :mod:`lightning_onebit.optim`), whose warm-up state is the same on all ranks.
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
        self._sketches = 0
        self._numels = [[p.numel() for p in group["params"]] for group in optimizer.param_groups]
        method_type = method_for(optimizer)
        self._check_second_moments()

        self._overlap = overlap and communicator.world_size > 1
        # Reversed: roughly the order in which backward produces gradients.
        placed = [(group, p) for group in optimizer.param_groups for p in group["params"]][::-1]
        kinds = sorted({(error_dtype(p.dtype), p.device) for _, p in placed}, key=str)
        self._pipelines = [
            Pipeline(
                optimizer,
                [(group, p) for group, p in placed if (error_dtype(p.dtype), p.device) == (dtype, device)],
                method_type,
                config,
                communicator,
                groups or flat_groups(communicator),
                lane or InlineLane(),
                overlap=self._overlap,
                dtype=dtype,
                device=device,
            )
            for dtype, device in kinds
        ]
        self._order = [(pipeline, members) for pipeline in self._pipelines for members in pipeline.bucket_parameters]
        self._anticipated = 0
        self._arrived: set[Tensor] = set()
        self._handle = optimizer.register_state_dict_post_hook(lambda _, state_dict: self._complete(state_dict))

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(map(sum, self._numels))

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
    def step(self) -> bool:
        """Compress, exchange, apply (steps 1 to 6 of the algorithm). Collective.

        A parameter without gradient on every rank sits out, as under torch's optimizers; without gradient on some, it
        counts as zero there.

        Returns:
            False if the step was skipped on all ranks, with all state untouched, because a gradient was infinite or NaN
            on one of them.
        """
        self._check_same_parameters()
        if self._overlap:
            # Whatever this rank has heard of its gradients: all ranks exchange all buckets, or none would know what to do.
            for pipeline, _ in self._order[self._anticipated :]:
                self._anticipate_next_(pipeline)
            self._anticipated = 0
            self._arrived.clear()
        with record_function("onebit::agree"):
            finite, active = self._agree()
        counters = self.communicator.counters
        counters.steps += 1
        counters.dense_equivalent_bytes += ring_all_reduce_nbytes(
            DENSE_ELEMENT_NBYTES * self.numel, self.communicator.world_size
        )
        for pipeline in self._pipelines:
            if finite:
                pipeline.step([active[p] for p in pipeline.parameters])
            elif self._overlap:
                pipeline.take_back()
        return finite

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the local gradients so that the norm of their mean over the ranks is at most ``max_norm``. Collective.

        As ``torch.nn.utils.clip_grad_norm_`` does under DDP, but with the norm estimated by a sketch (within about 1%),
        as no rank has the mean. All ranks use the same coefficient.

        Returns:
            The estimated norm before clipping, 0-d.
        """
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        sketch = NormSketch(self._sketches, device=self._pipelines[0].device)
        self._sketches += 1
        sketch.add_(grads, [p.numel() for p in params])
        self.communicator.all_reduce_mean_(sketch.buckets)
        norm = sketch.norm()
        clip_grads_with_norm_([p for p in params if p.grad is not None], max_norm, norm)
        return norm

    @torch.no_grad()
    def outstanding(self) -> dict[Tensor, Tensor]:
        """Per parameter, what has not been applied yet: mean worker error plus server error. Collective.

        In the space that is communicated, float32 or float64, shape of the parameter, the same on all ranks. Zero where
        nothing was ever quantized (one rank).
        """
        return {p: error for pipeline in self._pipelines for p, error in pipeline.outstanding().items()}

    @torch.no_grad()
    def add_outstanding_(self, errors: Mapping[Tensor, Tensor]) -> None:
        """Take over what an earlier run had not applied: added to the worker error of every rank.

        A single rank, which has no error, applies it at once.
        """
        for pipeline in self._pipelines:
            pipeline.add_outstanding_(errors)

    @torch.no_grad()
    def thaw_(self) -> None:
        """Give the optimizer its own state back and apply what is outstanding. Collective; the object is spent then."""
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
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {index: {**entry, **stock.get(params[index], {})} for index, entry in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def _agree(self) -> tuple[bool, dict[Tensor, bool]]:
        """Whether all gradients of all ranks are finite, and which parameters have one on any rank."""
        params = [p for pipeline in self._pipelines for p in pipeline.parameters]
        device = self._pipelines[0].device if self._pipelines else torch.device("cpu")
        flags = torch.tensor([0, *(p.grad is not None for p in params)], dtype=torch.int32, device=device)
        if self._overlap:
            flags[0] = not all(pipeline.all_finite for pipeline in self._pipelines)
        else:
            flags[0] = not all_finite([p.grad for p in params if p.grad is not None])
        self.communicator.all_reduce_max_(flags)
        any_nonfinite, *active = flags.tolist()
        return not any_nonfinite, {p: bool(flag) for p, flag in zip(params, active, strict=True)}

    def _check_same_parameters(self) -> None:
        if self._numels != [[p.numel() for p in group["params"]] for group in self.optimizer.param_groups]:
            raise RuntimeError(
                "The optimizer's parameters have changed since the second moment was frozen; new ones have none."
                " HINT: call `strategy.resume_warmup()` before adding parameters, and freeze again later."
            )

    def _check_second_moments(self) -> None:
        for p, state in self.optimizer.state.items():
            if "exp_avg_sq" in state and not torch.isfinite(state["exp_avg_sq"]).all():
                raise ValueError(
                    f"Cannot freeze: the second moment of {self._names.get(p, 'a parameter')!r} holds infinite or NaN"
                    " values, so the warm-up has already diverged. HINT: resume from an earlier checkpoint with a"
                    " smaller learning rate or with gradient clipping."
                )
