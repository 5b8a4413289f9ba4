"""What every volume of a daemon works with.

Plain values: volumes.py has the rules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from millpond.cache.chance import Chance
from millpond.cache.events import EngineEvents
from millpond.cache.exports import Agreed, Owner
from millpond.cache.settings import VolumeSettings
from millpond.cache.shaping import Admission, RateLimits
from millpond.cache.stores import Stores
from millpond.cache.tasks import Tasks
from millpond.native.engine import Engine

if TYPE_CHECKING:
    from millpond.cache.volumes import Volume


@dataclass(frozen=True, slots=True)
class Client:
    """A guest's connection, as whoever connected it wants it remembered."""

    volume: "Volume"
    agreed: Agreed
    owner: Owner


@dataclass(frozen=True, slots=True)
class World:
    """What every volume of a daemon works with."""

    engine: Engine
    events: EngineEvents
    chance: Chance
    tasks: Tasks
    host: Admission
    volume_rates: RateLimits  # where a volume's settings have none
    settings_of: Callable[[str], VolumeSettings]
    read_only: bool
    connected: Callable[[int, "Client"], None]
    stores: Stores

    @property
    def cache_id(self) -> bytes:
        """Who we are in holders."""
        return self.engine.cache_id

    def rates_of(self, settings: VolumeSettings) -> RateLimits:
        """What is in force for a volume."""
        return settings.rates if settings.rates != RateLimits() else self.volume_rates
