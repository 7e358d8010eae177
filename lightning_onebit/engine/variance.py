"""Coordinates that had no gradient on any rank when the second moment was frozen, and how they come to take part.

Such a coordinate (a row of an embedding whose word has not come up) has v = 0: it is no part of its block, and stays
bitwise unchanged. Its gradients gather on each rank in a second moment of its own,

    v_i = beta2 v_i + (1 - beta2) g_i^2

and at the next **refresh**, every 64 steps if any rank has something to tell, v = mean_i v_i becomes the same on all ranks,
D = sqrt(r v / (1 - beta2^t)) + eps, and the coordinate takes part from the next step on. A D that comes from one gradient
must not stay for ever: a coordinate is renewed at every refresh until it has taken part in 1 / (1 - beta2) steps.

r brings one rank's gradients to the scale of the mean's. For a coordinate that has its gradient on one rank at a time, and
for independent noise, the square of the mean gradient is 1 / n of the mean square; where all ranks have the same gradient, r
is 1. With s, the share of a tensor's gradient that the ranks have in common, r = s + (1 - s) / n. At each refresh s is
estimated from the gradients of that step, preconditioned: a_i = g_i / sqrt(v), q = mean ||a_i||^2 / n,
s = (||mean a_i||^2 - q) / (mean ||a_i||^2 - q). Until a tensor has had a gradient at a refresh, s = 0.

Without a second moment (SGD) there is nothing to gather but whether there was a gradient, which the worker error tells: it
keeps what is not sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_onebit.comm.groups import ExchangeGroups
from lightning_onebit.engine.buckets import Buckets, Part, square_root_
from lightning_onebit.quantize.memory import BucketMemory, StepInputs
from lightning_onebit.quantize.reference import pack_bits, unpack_bits

REFRESH_STEPS = 64
"""Steps between refreshes: with a full one, later, 1/8 bit per element and step."""
MEMORY_OF_REFRESHES = 0.9
"""Weight of earlier refreshes in a tensor's s."""
COORDINATES_PER_FLAG = 64
"""Before second moments travel, one byte for so many coordinates tells whether any rank has one there."""
NEVER = -1


class LateCoordinates:
    """Those of one bucket that were not live at the freeze, until their D is as good as that of the others.

    Args:
        buckets: of which the bucket is one.
        index: which.
    """

    def __init__(self, buckets: Buckets, index: int) -> None:
        self._buckets, self._index, self.memory = buckets, index, buckets.memories[index]
        self.places = torch.zeros(0, dtype=torch.int32, device=self.memory.device)
        """Their places in the bucket's flat memory, rising, int32 ``[late]``."""
        self.live_since = torch.zeros(0, dtype=torch.int32)
        """Number of the step after which each takes part; :data:`NEVER`: it does not yet. int32 ``[late]``"""
        self.second_moment = torch.zeros(0, dtype=buckets.dtype)
        """v_i, of those in this rank's share, in the dtype of the errors."""
        is_late = self.memory.live is not None and self.memory.rms is not None
        self._set_places_(_not_live(self.memory) if is_late else self.places)

    def _set_places_(self, places: Tensor) -> None:
        self.places = places.to(torch.int32)
        self.live_since = torch.full_like(self.places, NEVER)
        self._locate_()
        self.second_moment = torch.zeros(self._own.stop - self._own.start, dtype=self.memory.dtype, device=places.device)

    def _locate_(self) -> None:
        """Note which of the coordinates are in this rank's share, and of which parameters. Waits for the device."""
        share, parts, device = self.memory.share_flat, self._buckets.parts[self._index], self.places.device
        bounds = torch.tensor([share.start, share.stop], dtype=torch.int32, device=device)
        self._own = slice(*torch.searchsorted(self.places, bounds).tolist())
        starts = torch.tensor([part.flat for part in parts], dtype=torch.int32, device=device)
        parameters = torch.tensor([part.parameter for part in parts], dtype=torch.int64, device=device)
        places = self.places[self._own]
        self._in_share = places.long() - share.start
        self._parameter = parameters[torch.searchsorted(starts, places, right=True) - 1] if len(places) else parameters[:0]
        self._decays: tuple[list[float], Tensor] | None = None
        self._cached = None

    def __len__(self) -> int:
        return self.places.numel()

    @torch.no_grad()
    def collect_(self, index: int, step: StepInputs) -> None:
        """``v_i = beta2 v_i + (1 - beta2) g_i^2``, for a step that counts.

        Args:
            index: of the bucket.
            step: the gradients, and which parameters are active.
        """
        if self._own.start == self._own.stop or self.memory.rms is None:
            return
        g, beta2 = self._gradient(index, step), self._decay_by_coordinate()
        v = self.second_moment * beta2 + (1.0 - beta2) * g * g
        v.clamp_(max=torch.finfo(v.dtype).max)  # beyond it a coordinate would never train again
        torch.where(step.is_active[self._parameter], v, self.second_moment, out=self.second_moment)

    def _gradient(self, index: int, step: StepInputs) -> Tensor:
        """g_i of the coordinates in this rank's share, in the dtype of the errors."""
        shared, kernels = step.share_gradients.get(index), self._buckets.device_kernels
        if shared is None and kernels is not None:  # in one launch, whatever the number of parameters
            shared = torch.empty(self.memory.layout.flat_numel, dtype=self.memory.dtype, device=self.memory.device)
            kernels.gather_(shared, self.memory, step)
        if shared is not None:
            return shared.index_select(0, self._in_share)
        g = torch.zeros_like(self.second_moment)
        for part, chosen, elements in self._by_part():
            gradient = step.gradients[part.parameter]
            if gradient is not None:
                g[chosen] = part.of_parameter(gradient).index_select(0, elements).to(g.dtype)
        return g

    def _decay_by_coordinate(self) -> Tensor:
        """beta2 of each coordinate in this rank's share."""
        buckets = self._buckets
        by_group = [buckets.method.second_moment_decay(group) for group in buckets.optimizer.param_groups]
        if self._decays is None or self._decays[0] != by_group:
            decays = torch.tensor([by_group[group] for group in buckets.param_group_of], dtype=self.memory.dtype)
            self._decays = by_group, decays.to(self._parameter.device)[self._parameter]
        return self._decays[1]

    def _by_part(self) -> list[tuple[Part, slice, Tensor]]:
        """Of this rank's share: a part, which second moments are its, and their elements in it, int32."""
        if self._cached is None:
            own = self._own
            places, self._cached = self.places[own], []
            parts = [part for part in self._buckets.parts[self._index] if part.of_share(self.memory.error) is not None]
            starts = torch.tensor([part.flat for part in parts], dtype=torch.int32, device=places.device)
            cuts = [*torch.searchsorted(places, starts).tolist(), len(places)]
            for part, first, last in zip(parts, cuts[:-1], cuts[1:], strict=True):
                if first < last:
                    self._cached.append((part, slice(first, last), places[first:last] - part.flat))
        return self._cached

    _cached: list[tuple[Part, slice, Tensor]] | None = None

    def has_news(self) -> Tensor | None:
        """Whether this rank has a second moment, or a gradient, of a coordinate that is renewed: bool, 0-d.

        ``None``: it cannot have. Does not wait for the device.
        """
        if self.memory.rms is not None:
            return self.second_moment.any() if len(self) else None
        return None if self.memory.live is None else (self.memory.error.ne(0) & ~self._share_live()).any()

    def _share_live(self) -> Tensor:
        assert self.memory.live is not None
        return unpack_bits(self.memory.live)[self.memory.share_flat]

    @torch.no_grad()
    def gather_(self, groups: ExchangeGroups) -> tuple[Tensor, Tensor]:
        """Make second moments those of all ranks. Collective.

        Returns:
            v of all coordinates, and which of those in this rank's share have travelled.
        """
        memory = self.memory
        if memory.rms is None:
            self._set_places_(_not_live(memory))
            error = memory.error[(self.places[self._own] - memory.share_flat.start).long()]
            self.second_moment = error.ne(0).to(memory.dtype)
        if not len(self):
            return self.second_moment, torch.zeros(0, dtype=torch.int64, device=self.places.device)
        return self._mean_over_ranks_(groups)

    @torch.no_grad()
    def renew_(self, v: Tensor, *, number: int) -> None:
        """Let coordinates with a second moment ``v`` take part, or renew their D, from the next step on."""
        if not len(self):
            return
        memory, has_v = self.memory, v > 0
        if memory.rms is not None:
            self._renew_rms_(v, has_v)
        if bool((has_v & (self.live_since == NEVER)).any()):
            live = self._live_bits()
            live[self.places[has_v].long()] = True
            memory.live = None if not len(_not_live(memory, live)) else pack_bits(live)
            self.live_since = torch.where(has_v & (self.live_since == NEVER), number, self.live_since)
        self._drop_established_(number)

    def note_live_(self, number: int) -> None:
        """After a refresh of all coordinates at the end of step ``number``: note which of these take part since then."""
        if len(self):
            new = (self.live_since == NEVER) & self._live_bits()[self.places.long()]
            self.live_since = torch.where(new, number, self.live_since)

    def _live_bits(self) -> Tensor:
        if self.memory.live is None:
            return torch.ones(self.memory.layout.flat_numel, dtype=torch.bool, device=self.memory.device)
        return unpack_bits(self.memory.live)

    def _mean_over_ranks_(self, groups: ExchangeGroups) -> tuple[Tensor, Tensor]:
        """v = mean_i v_i of all coordinates of the bucket; those of this rank's share are written to ``second_moment``.

        Returns:
            v, and which of the share's coordinates have travelled, as some rank has a second moment there.
        """
        own, peers = self._own, groups.peers
        numel = own.stop - own.start
        flags = torch.zeros(-(-numel // COORDINATES_PER_FLAG) * COORDINATES_PER_FLAG, dtype=torch.uint8).to(
            self.places.device
        )
        flags[:numel] = self.second_moment > 0
        touched = flags.view(-1, COORDINATES_PER_FLAG).amax(dim=1) if numel else flags
        if numel:
            peers.all_reduce_max_(touched)
        chosen = touched.repeat_interleave(COORDINATES_PER_FLAG)[:numel].nonzero().view(-1)
        mean = peers.ordered_mean(self.second_moment[chosen])
        self.second_moment[chosen] = mean.clamp_(max=torch.finfo(mean.dtype).max)
        if groups.node is None:
            return self.second_moment, chosen
        # Inside the node every rank has those of its own share: put them together, in shares of one length.
        sizes = self._share_sizes()
        padded = torch.zeros(max(sizes), dtype=self.memory.dtype, device=self.places.device)
        padded[:numel] = self.second_moment
        gathered = padded.new_empty(len(sizes) * max(sizes))
        groups.node.all_gather_(gathered, padded)
        v = torch.cat([part[:size] for part, size in zip(gathered.view(len(sizes), -1), sizes, strict=True)])
        return v, chosen

    @torch.no_grad()
    def add_squares_(self, squares: Tensor, groups: ExchangeGroups, index: int, step: StepInputs, chosen: Tensor) -> None:
        """Add ||mean a_i||^2 and ||a_i||^2 of the share's coordinates ``chosen`` to ``squares``. Collective.

        Args:
            squares: float64 ``[2, parameters]``.
            groups: the ranks.
            index: of the bucket.
            step: the gradients g_i; a_i = g_i / sqrt(v).
            chosen: which of the share's late coordinates have a second moment on any rank, or neighbours that have.
        """
        if not len(self):
            return
        gradient = self._gradient(index, step)[chosen]
        a = gradient.div_(self.second_moment[chosen].sqrt()).nan_to_num_(0.0, 0.0, 0.0)  # 0 / 0: no gradient anywhere
        a_bar, tensor = groups.peers.ordered_mean(a), self._parameter[chosen]
        for row, values in zip(squares, (a_bar, a), strict=True):
            row.index_add_(0, tensor, values.double().square())

    def _share_sizes(self) -> list[int]:
        topology, layout = self._buckets.topology, self.memory.layout
        starts = [
            layout.flat_of(range(r * topology.num_nodes, r * topology.num_nodes + 1))[0]
            for r in range(topology.local_world_size)
        ]
        cuts = torch.searchsorted(self.places, torch.tensor(starts, dtype=torch.int32, device=self.places.device)).tolist()
        return [stop - start for start, stop in zip(cuts, [*cuts[1:], len(self)], strict=True)]

    def _renew_rms_(self, v: Tensor, has_v: Tensor) -> None:
        """D of all coordinates with a second moment: ``rms = sqrt(r v / (1 - beta2^t))``."""
        assert self.memory.rms is not None
        for part in self._buckets.parts[self._index]:
            bounds = torch.tensor([part.flat, part.flat + part.numel], dtype=torch.int32, device=self.places.device)
            first, last = torch.searchsorted(self.places, bounds).tolist()
            if first == last or not self._buckets.steps[part.parameter]:  # never had a gradient: t = 0
                continue
            beta2 = self._buckets.method.second_moment_decay(self._buckets.group(part.parameter))
            correction = 1.0 - beta2 ** int(self._buckets.steps[part.parameter])
            s = float(self._buckets.common_share_of(part.parameter))
            renewed = v[first:last] * ((s + (1.0 - s) / self._buckets.topology.num_nodes) / correction)
            renewed.clamp_(max=torch.finfo(renewed.dtype).max)
            square_root_(renewed, out=renewed)
            # A v so small that its root would be 0 still belongs to an element that takes part.
            renewed.clamp_(min=torch.finfo(renewed.dtype).tiny)
            places, chosen = self.places[first:last].long(), has_v[first:last]
            self.memory.rms[places[chosen]] = renewed[chosen]

    # What a checkpoint holds

    def second_moments(self) -> tuple[Tensor, Tensor]:
        """v_i that are not zero: places among all elements of the optimizer, int64, and float64 values; on the CPU."""
        places = [torch.zeros(0, dtype=torch.int64)]
        values = [torch.zeros(0, dtype=torch.float64)]
        if self.memory.rms is not None:
            for part, chosen, elements in self._by_part():
                v = self.second_moment[chosen]
                first = self._buckets.places[part.parameter] + part.start
                places.append((elements[v > 0].long() + first).cpu())
                values.append(v[v > 0].double().cpu())
        return torch.cat(places), torch.cat(values)

    def add_second_moments_(self, places: Tensor, values: Tensor) -> None:
        """Add what :meth:`second_moments` has returned, where coordinates are late here; ``places`` rise."""
        if self.memory.rms is None:
            return
        for part, chosen, elements in self._by_part():
            first = self._buckets.places[part.parameter] + part.start
            start, stop = torch.searchsorted(places, torch.tensor([first, first + part.numel])).tolist()
            wanted = (places[start:stop] - first).to(elements)
            at = torch.searchsorted(elements, wanted).clamp_(max=len(elements) - 1)
            found = elements[at] == wanted
            self.second_moment[chosen][at[found]] += values[start:stop].to(self.second_moment)[found]

    def shared_state(self) -> dict[int, dict[str, Tensor]]:
        """By parameter, ``late``: its late elements, and ``live_since``: since when each is live; int32. Only if any are."""
        shared: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for part in self._buckets.parts[self._index] if len(self) else []:
            bounds = torch.tensor([part.flat, part.flat + part.numel], dtype=torch.int32, device=self.places.device)
            first, last = torch.searchsorted(self.places, bounds).tolist()
            if first < last:
                elements = self.places[first:last] + (part.start - part.flat)
                shared.setdefault(part.parameter, []).append((elements, self.live_since[first:last]))
        return {
            p: {"late": torch.cat([e for e, _ in found]), "live_since": torch.cat([s for _, s in found])}
            for p, found in shared.items()
        }

    def restore_(self, shared: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over :meth:`shared_state` of all buckets of an earlier run.

        Raises:
            ValueError: if an entry does not fit its parameter.
        """
        if self.memory.rms is None:
            return
        places, since = [self.places[:0]], [self.live_since[:0]]
        for part in self._buckets.parts[self._index]:
            entry = shared[part.parameter]
            if "late" not in entry:
                continue
            late, since_then = entry["late"], entry.get("live_since")
            if not isinstance(late, Tensor) or not isinstance(since_then, Tensor):
                raise ValueError("`late` or `live_since` is no tensor")
            elements, live_since = late.to(self.places), since_then.to(self.live_since)
            numel = self._buckets.params[part.parameter].numel()
            if (
                elements.shape != live_since.shape
                or elements.dim() != 1
                or not bool(((elements >= 0) & (elements < numel)).all() & (elements.diff() > 0).all())
            ):
                raise ValueError("`late` or `live_since` does not fit the parameter")
            inside = (elements >= part.start) & (elements < part.start + part.numel)
            places.append(elements[inside] + (part.flat - part.start))
            since.append(live_since[inside])
        self._set_places_(torch.cat(places))
        self.live_since = torch.cat(since)

    def _drop_established_(self, number: int) -> None:
        """Forget coordinates that have taken part for 1 / (1 - beta2) steps: their D stays."""
        longest = max(
            (1.0 / (1.0 - self._buckets.method.second_moment_decay(g)) for g in self._buckets.optimizer.param_groups),
            default=0.0,
        )
        keep = (self.live_since == NEVER) | (number - self.live_since < longest)
        if self.memory.rms is None:  # there is nothing to renew, and who is not live is known
            keep[:] = False
        if bool(keep.all()):
            return
        self.second_moment = self.second_moment[keep[self._own]]
        self.places, self.live_since = self.places[keep], self.live_since[keep]
        self._locate_()


def refresh_late_(
    all_late: Sequence[LateCoordinates], buckets: Buckets, groups: ExchangeGroups, step: StepInputs, *, number: int
) -> None:
    """Make second moments those of all ranks, and let coordinates take part that have one. Collective.

    Valid from the next step on.

    Args:
        all_late: those of ``buckets``, bucket by bucket.
        buckets: their r is learned from the gradients of this step; a tensor may be in several.
        groups: the ranks.
        step: the gradients.
        number: of this step, from which it follows for how long coordinates have taken part.
    """
    gathered = [late.gather_(groups) for late in all_late]
    if buckets.method.has_second_moment and any(len(late) for late in all_late):
        squares = torch.zeros(2, len(buckets.params), dtype=torch.float64, device=buckets.device)
        for index, (late, (_, chosen)) in enumerate(zip(all_late, gathered, strict=True)):
            late.add_squares_(squares, groups, index, step, chosen)
        _learn_common_share_(buckets, groups, squares)
    for late, (v, _) in zip(all_late, gathered, strict=True):
        late.renew_(v, number=number)


def _learn_common_share_(buckets: Buckets, groups: ExchangeGroups, squares: Tensor) -> None:
    """Add this step's ||mean a_i||^2 and ||a_i||^2 to what is known of s: once per tensor, not per bucket. Collective."""
    n, common = groups.peers.world_size, buckets.common_share
    squares = groups.peers.ordered_mean(squares.view(-1)).view(2, -1)  # the same bits on all ranks
    if groups.node is not None:  # the sum over the shares
        squares = groups.node.ordered_mean(squares.view(-1)).view(2, -1) * groups.node.world_size
    of_mean, mean = squares.cpu()
    here = mean > 0
    common[:, here] *= MEMORY_OF_REFRESHES
    common[:, here] += torch.stack([of_mean - mean / n, mean - mean / n])[:, here]


def first_gradients_(buckets: Buckets, gradients: Sequence[Tensor | None], groups: ExchangeGroups) -> None:
    """Before the first step of a method without a second moment: elements with a gradient or momentum on any rank are live.

    Collective: one byte per element, once.

    Args:
        buckets: whose masks are written.
        gradients: by parameter, flat.
        groups: the ranks.
    """
    for memory, parts in zip(buckets.memories, buckets.parts, strict=True):
        seen = torch.zeros(memory.layout.flat_numel, dtype=torch.bool, device=memory.device)
        seen[memory.share_flat] = memory.error != 0
        for part in parts:
            gradient = gradients[part.parameter]
            if gradient is not None:
                part.of_bucket(seen).logical_or_(part.of_parameter(gradient) != 0)
            if buckets.numbers_of(part.parameter).coupled_decay:
                part.of_bucket(seen).fill_(True)
        anywhere = seen.to(torch.uint8)
        for communicator in (groups.peers, groups.node):
            if communicator is not None:
                communicator.all_reduce_max_(anywhere)
        live = anywhere != 0
        memory.live = pack_bits(live) if len(_not_live(memory, live)) else None
        memory.live_before = memory.live


def _not_live(memory: BucketMemory, live: Tensor | None = None) -> Tensor:
    """Places of the elements that are not live, without padding."""
    if live is None:
        if memory.live is None:
            return torch.zeros(0, dtype=torch.int64, device=memory.device)
        live = unpack_bits(memory.live)
    exists = torch.from_numpy(memory.layout.exists()).to(memory.device)
    return (exists & ~live).nonzero().view(-1)
