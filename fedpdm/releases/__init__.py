"""A client's releases: every image is noised once, for ever, and the ledger says so."""

from fedpdm.releases.request import ReleasePreview, ReleaseRequest
from fedpdm.releases.store import ReleaseStore, SpentBudget

__all__ = ["ReleasePreview", "ReleaseRequest", "ReleaseStore", "SpentBudget"]
