"""A client's releases: every image is noised once, for ever, and the ledger says so."""

from fedpdm.privacy.releases.request import ReleasePreview, ReleaseRequest
from fedpdm.privacy.releases.store import ReleaseStore, SpentBudget

__all__ = ["ReleasePreview", "ReleaseRequest", "ReleaseStore", "SpentBudget"]
