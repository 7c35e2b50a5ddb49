"""A text generator's cache with a row for each of several texts, which stand at places of their own.

`open_slots` gives the one that fits the model: `InPlaceSlots` where the model writes into buffers that it is given
(`DeviceSlots` where they are a GPU's), `GrowingSlots` where it gives back the past and what is new, as one. What a row
reads is the same, whoever shares its calls, but for rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.model_session import CAPACITY, ModelSession
    from teamlora_export.deploy.session import Session
    from teamlora_export.deploy.slots_base import MOST_PADDING, MOST_SLOTS, Slots
    from teamlora_export.deploy.slots_growing import GrowingSlots
    from teamlora_export.deploy.slots_in_place import InPlaceSlots
    from teamlora_export.deploy.slots_on_device import DeviceSlots
else:
    # Deployed: the files lie beside one another.
    from failure import ModelError
    from model_session import CAPACITY, ModelSession
    from session import Session
    from slots_base import MOST_PADDING, MOST_SLOTS, Slots
    from slots_growing import GrowingSlots
    from slots_in_place import InPlaceSlots
    from slots_on_device import DeviceSlots

__all__ = ["MOST_PADDING", "MOST_SLOTS", "DeviceSlots", "GrowingSlots", "InPlaceSlots", "Slots", "open_slots"]


def open_slots(session: ModelSession, slots: int = 8, part: int = 256, most: int | None = None) -> Slots:
    """See `Slots`.

    Raises:
        ModelError: the model generates no text, `slots` or `part` are none, or there is not so much memory.
    """
    in_place = bool(session.caches) and CAPACITY.fullmatch(str(session.caches[0].shape[2]))
    if in_place:
        return (InPlaceSlots if session.device[0] == "cpu" else DeviceSlots)(session, slots, part, most)
    if isinstance(session, Session):
        return GrowingSlots(session, slots, part, most)
    raise ModelError(f"{session.folder}: is an engine that keeps no cache in place, so that texts share no steps.")
