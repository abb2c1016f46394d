"""How much an owner keeps in storage, and what to say when that is too much.

Counted are the data sets they uploaded and the versions of their jobs. A run that has begun is not stopped by
the quota: what it trained is worth more than the bytes.
"""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.tables import AdapterVersion, Dataset, Job
from service.errors import TooLarge


def bytes_left(session: Session, owner: str, quota: int) -> int:
    """Return how much the owner may still store. Raises TooLarge when that is nothing."""
    of_datasets = session.scalar(select(func.sum(Dataset.bytes)).where(Dataset.owner == owner)) or 0
    wanted = select(func.sum(AdapterVersion.bytes)).join(Job, Job.id == AdapterVersion.job_id)
    of_versions = session.scalar(wanted.where(Job.owner == owner)) or 0
    left = quota - int(of_datasets) - int(of_versions)
    if left <= 0:
        raise TooLarge(
            f"{owner!r} keeps {of_datasets} bytes of data sets and {of_versions} of adapter versions; the"
            f" quota is {quota} (CLPEFT_OWNER_QUOTA_BYTES). Data sets that no job uses can be deleted",
            code="quota_exceeded",
        )
    return left


def check_quota(session: Session, owner: str, quota: int) -> None:
    """Raise TooLarge when nothing is left of the owner's quota; 0 is no limit."""
    if quota:
        bytes_left(session, owner, quota)
