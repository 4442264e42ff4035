"""Experiment trackers: a run's rounds and last pictures, shown elsewhere than in its directory.

`run.trackers: [tensorboard]` chooses them. They get what the server knows and keeps in
`metrics.json`, nothing else; see `fedpdm.reporting.trackers.following`.
"""

from fedpdm.reporting.trackers.following import RunTrackers, check_trackers, open_trackers
from fedpdm.reporting.trackers.interface import Tracker

__all__ = ["RunTrackers", "Tracker", "check_trackers", "open_trackers"]
