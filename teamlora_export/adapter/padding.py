"""Adapters of different sizes in slots of one shape, exactly.

An expert's weights are w = (p mix) / (p mix 1), whatever p is scaled by. So, of an adapter in a larger slot,

- an expert that it does not have is a row and a column of zeros in `mix`: it adds to neither side of the fraction;
- a rank that its experts do not have is a row of zeros in A and in B;
- an expert of a larger rank than the slot's is cut into m parts, each an expert with the same logit. Their p is p / m
  and together p; `mix` repeated m times in both directions gives each part w / m, and B is m times larger, not A, whose
  products with tokens would overflow in 16 bits. m is a power of two, so that B is rounded as it is by itself, but for
  numbers so small that it is rounded less;
- a module that it does not adapt has no experts at all.

What the layer computes stays the same number, up to the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from teamlora_export.adapter.config import AdapterConfig
from teamlora_export.adapter.spec import AdapterSpec, ExpertProjection
from teamlora_export.adapter.tensors import common_dtype


@dataclass(frozen=True)
class Room:
    """What slots have room for beside the adapters that they are made for.

    Attributes:
        rank: the largest r of TeamLoRA or LoRA: of all experts of a module together. Where r is of each expert
            (MoELoRA; HydraLoRA and CoMoL, unless all adapters share A so), k times that is enough. 0: none.
        experts: the largest k. 0: none.
    """

    rank: int = 0
    experts: int = 0

    def expert_rank(self, num_experts: int, shared: bool) -> int:
        """Of each of a slot's experts, for adapters of up to this rank, whatever number of experts divides theirs."""
        if shared or not self.rank:
            return self.rank
        # The largest multiple of k that is no larger than this rank needs the most.
        counts = range(1, min(num_experts, self.rank) + 1)
        return max(_rank_of_parts(k, self.rank // k, num_experts) for k in counts)

    @staticmethod
    def of(pairs: Iterable[tuple[Slot, ExpertProjection]]) -> Room:
        """What the slots need beside their own, for the projection beside each."""
        pairs = list(pairs)
        k = max(max(slot.num_experts, p.num_experts) for slot, p in pairs)
        return Room(max(_rank_in(slot, p, k) for slot, p in pairs), k)


# A rank or a number of experts that is asked for beyond them is a slip.
MOST_ROOM = Room(4096, 1024)


@dataclass(frozen=True)
class Slot:
    """The shape that one module's adapters share, in the words of `ExpertProjection`."""

    in_features: int
    out_features: int
    num_experts: int
    expert_rank: int
    shared_down: bool

    @staticmethod
    def around(projection: ExpertProjection) -> Slot:
        """The slot that a projection fills."""
        k, c = projection.num_experts, projection.expert_rank
        return Slot(projection.in_features, projection.out_features, k, c, projection.shared_down)

    @property
    def down_rank(self) -> int:
        return self.expert_rank if self.shared_down else self.num_experts * self.expert_rank

    def parts(self, projection: ExpertProjection) -> int:
        """Into how many experts each of an adapter's is cut in this slot, which multiplies its B by as many."""
        return 1 if self.shared_down else _parts(projection.expert_rank, self.expert_rank)

    def misfit(self, projection: ExpertProjection) -> str | None:
        """Why an adapter's module has no place in this slot, or None where it has."""
        found = (projection.in_features, projection.out_features)
        if found != (self.in_features, self.out_features):
            return f"maps {found[0]} to {found[1]} features, the base {self.in_features} to {self.out_features}"
        k, c = projection.num_experts, projection.expert_rank
        if k > self.num_experts:
            return f"has {k} experts, the bundle's slots have room for {self.num_experts}"
        if self.shared_down and not _is_shared(projection) and projection.down_rank > self.expert_rank:
            return (
                f"has {projection.down_rank} rows in A, which its experts do not share, the bundle's slots have room "
                f"for {self.expert_rank} that they share"
            )
        if c > self.expert_rank and (self.shared_down or k * _parts(c, self.expert_rank) > self.num_experts):
            return (
                f"has {k} experts of rank {c}, the bundle's slots have room for {self.num_experts} of rank "
                f"{self.expert_rank}"
            )
        return None


def slots_for(adapters: Iterable[AdapterSpec], room: Room | None = None) -> dict[str, Slot]:
    """The least slot of each module, by its path, that has room for each of `adapters`, which fit one base.

    Args:
        room: that there is to be as well.
    """
    found: dict[str, list[ExpertProjection]] = {}
    for adapter in adapters:
        for path, projection in adapter.projections.items():
            found.setdefault(path, []).append(projection)
    return {path: _slot_of(projections, room or Room()) for path, projections in sorted(found.items())}


def slots_like(slots: Mapping[str, Slot], features: Mapping[str, tuple[int, int]]) -> dict[str, Slot]:
    """Slots for further modules, by their path, with as many experts and as large a rank of each as any of `slots`.

    Args:
        features: of each module, in and out.
    """
    shared = all(slot.shared_down for slot in slots.values())
    k = max(slot.num_experts for slot in slots.values())
    rank = max(slot.expert_rank for slot in slots.values())
    return {path: Slot(*sizes, k, rank, shared) for path, sizes in features.items()}


def room_for(adapter: AdapterSpec, slots: Mapping[str, Slot]) -> Room:
    """With what an export makes slots as large as `slots`, and large enough for `adapter`: where it has modules that
    have none, for such as `slots_like` makes.

    Args:
        adapter: its paths are those of `slots`.
    """
    new = {path: (p.in_features, p.out_features) for path, p in adapter.projections.items() if path not in slots}
    known = {**slots, **slots_like(slots, new)}
    present = [(slot, _nothing(path, slot)) for path, slot in slots.items()]
    return Room.of([*present, *((known[path], projection) for path, projection in adapter.projections.items())])


def placed(adapter: AdapterSpec, slots: Mapping[str, Slot]) -> AdapterSpec:
    """`adapter`, whose every module fits its slot, in the shape of all `slots`."""
    projections = {
        path: place(adapter.projections[path], slot) if path in adapter.projections else _nothing(path, slot)
        for path, slot in slots.items()
    }
    return replace(adapter, projections=projections)


def as_adapter(slots: Mapping[str, Slot], source: str = "") -> AdapterSpec:
    """What a graph with slots is traced with: an adapter of their shapes, and of no numbers.

    Args:
        source: what it is called where it does not fit.
    """
    projections = {path: _nothing(path, slot) for path, slot in slots.items()}
    rank = max((slot.down_rank for slot in slots.values()), default=1)
    return AdapterSpec("slots", AdapterConfig(rank, 1.0), projections, {}, source, "0" * 64)


def place(projection: ExpertProjection, slot: Slot) -> ExpertProjection:
    """`projection`, which fits, in the shape of `slot`."""
    if slot.shared_down:
        return _place_shared(projection, slot)
    k, c = projection.num_experts, slot.expert_rank
    parts = slot.parts(projection)
    down = np.zeros((slot.down_rank, slot.in_features), projection.down.dtype)
    ups = _no_ups(slot, projection)
    for expert, up in enumerate(projection.ups):
        first = 0 if projection.shared_down else expert * projection.expert_rank
        for part in range(parts):
            columns = range(part * c, min((part + 1) * c, projection.expert_rank))
            to = expert * parts + part
            rows = slice(first + columns.start, first + columns.stop)
            down[to * c : to * c + len(columns)] = projection.down[rows]
            with np.errstate(over="ignore"):
                # What is none then is refused where it is written.
                ups[to][:, : len(columns)] = parts * up[:, columns.start : columns.stop]
    together = np.ones((parts, parts))
    return replace(
        _nothing(projection.path, slot),
        down=down,
        router=_rows(np.repeat(projection.router, parts, axis=0), slot.num_experts),
        # I + M of each pair of parts is I + M of their experts.
        interaction=_interaction(
            np.kron(projection.interaction.astype(np.float64), together)
            + (np.kron(np.eye(k), together) - np.eye(k * parts)),
            slot.num_experts,
        ),
        ups=tuple(ups),
        scaling=projection.scaling,
        routing_sum=projection.routing_sum,
    )


def _place_shared(projection: ExpertProjection, slot: Slot) -> ExpertProjection:
    """Every expert reads all rows of A, and what it does not share it multiplies by zero."""
    ups = _no_ups(slot, projection)
    for expert, up in enumerate(projection.ups):
        first = 0 if projection.shared_down else expert * projection.expert_rank
        ups[expert][:, first : first + projection.expert_rank] = up
    return replace(
        _nothing(projection.path, slot),
        down=_rows(projection.down, slot.down_rank),
        router=_rows(projection.router, slot.num_experts),
        interaction=_interaction(projection.interaction.astype(np.float64), slot.num_experts),
        ups=tuple(ups),
        scaling=projection.scaling,
        routing_sum=projection.routing_sum,
    )


def _slot_of(projections: list[ExpertProjection], room: Room) -> Slot:
    first = projections[0]
    own = max(p.num_experts for p in projections)
    # Where one adapter's experts do not share A, those of all have their own rows of it.
    shared = own > 1 and all(_is_shared(p) for p in projections)
    k = max(own, room.experts)
    ranks = [p.expert_rank if shared else _rank_of_parts(p.num_experts, p.expert_rank, k) for p in projections]
    return Slot(first.in_features, first.out_features, k, max(*ranks, room.expert_rank(k, shared)), shared)


def _parts(rank: int, room: int) -> int:
    """Into how many parts an expert is cut, for each to have a rank of `room` at most."""
    return 1 << (-(-rank // room) - 1).bit_length()


def _rank_of_parts(experts: int, rank: int, most: int) -> int:
    """Of so many experts of a rank, when they are cut so that there are `most` of them at most."""
    return -(-rank // _power_below(most // experts))


def _rank_in(slot: Slot, projection: ExpertProjection, num_experts: int) -> int:
    """The room's rank by which a slot of `num_experts` takes a projection."""
    if slot.shared_down:
        return projection.expert_rank if _is_shared(projection) else projection.down_rank
    parts = _rank_of_parts(projection.num_experts, projection.expert_rank, num_experts)
    return parts * _power_below(num_experts)


def _power_below(number: int) -> int:
    """The largest power of two that is not above `number`."""
    return 1 << (number.bit_length() - 1)


def _is_shared(projection: ExpertProjection) -> bool:
    return projection.shared_down or projection.num_experts == 1


def _nothing(path: str, slot: Slot) -> ExpertProjection:
    """A module without experts. All of its zeros are one number in memory."""
    zero, k = np.zeros((), np.float32), slot.num_experts
    up = np.broadcast_to(zero, (slot.out_features, slot.expert_rank))
    return ExpertProjection(
        path=path,
        down=np.broadcast_to(zero, (slot.down_rank, slot.in_features)),
        router=np.broadcast_to(zero, (k, slot.in_features)),
        interaction=-np.eye(k),
        ups=(up,) * k,
        scaling=1.0,
        routing_sum=1.0,
        shared_down=slot.shared_down,
    )


def _no_ups(slot: Slot, projection: ExpertProjection) -> list[np.ndarray]:
    """Zeros for each of a slot's experts, of a dtype that holds all of a projection's."""
    dtype = common_dtype(projection.ups)
    return [np.zeros((slot.out_features, slot.expert_rank), dtype) for _ in range(slot.num_experts)]


def _rows(array: np.ndarray, count: int) -> np.ndarray:
    """`count` rows, those that `array` lacks being zero."""
    rows = np.zeros((count, *array.shape[1:]), array.dtype)
    rows[: len(array)] = array
    return rows


def _interaction(own: np.ndarray, count: int) -> np.ndarray:
    """M of `count` experts, of those beyond `own` such that I + M is zero."""
    interaction = -np.eye(count)
    interaction[: len(own), : len(own)] = own
    return interaction
