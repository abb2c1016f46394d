"""Data sets as jobs need them: looked up in the caller's transaction, and as a worker finds them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from service.adapters.storage import dataset_key
from service.db.tables import Dataset
from service.errors import NotFound
from service.specs import PlannedDataset

# made once: every submission runs it, and to make it takes longer than to run it
_DATASETS = select(Dataset).where(Dataset.id.in_(bindparam("ids", expanding=True)))


def get_dataset(session: Session, dataset_id: str) -> Dataset:
    """Return a data set. Raises NotFound."""
    found = session.get(Dataset, dataset_id)
    if found is None:
        raise NotFound(f"no data set {dataset_id!r}", code="dataset_not_found")
    return found


def datasets_of(session: Session, ids: Collection[str]) -> Sequence[Dataset]:
    """Return the data sets of these ids that there are."""
    return session.scalars(_DATASETS, {"ids": list(ids)}).all()


def planned_dataset(row: Dataset) -> PlannedDataset:
    """Return a data set as a worker finds it."""
    return PlannedDataset(id=row.id, path=dataset_key(row.id), sha256=row.sha256, num_rows=row.num_rows)
