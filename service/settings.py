"""Settings of the service, from the environment (prefix CLPEFT_) with defaults for one machine."""

from __future__ import annotations

from pathlib import Path

import fsspec
from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where things are and how large they may grow. Paths default to folders under home."""

    model_config = SettingsConfigDict(env_prefix="CLPEFT_", frozen=True)

    home: Path = Field(default_factory=lambda: Path.home() / ".clpeft")
    host: str = "127.0.0.1"
    port: int = Field(8321, ge=0, le=65535)
    database_url: str = Field("", repr=False)
    """sqlite:////path or postgresql://user:password@host/name; empty means SQLite under home."""
    storage_url: str = ""
    """fsspec URL; empty means a folder under home."""
    models_dir: Path = Path()
    """Folder of prepared base models, one folder each; empty means home/models."""
    ray_dashboard_url: str = ""
    """Jobs API of the Ray cluster, for example http://127.0.0.1:8265."""
    serve_url: str = ""
    """HTTP address of the Ray Serve proxy, for example http://127.0.0.1:8000."""
    serve_threads: int = Field(1, ge=1)
    """Torch threads of a serving replica."""
    serve_replicas: int = Field(1, ge=1)
    serve_max_adapters: int = Field(16, ge=1)
    """Adapters that a replica keeps in memory."""
    ray_token_path: Path | None = None
    """File (0600) with the Ray cluster's token; None when the cluster asks for none."""
    max_upload_bytes: int = Field(1024 * 2**20, ge=1)
    max_row_bytes: int = Field(2**20, ge=1)
    max_concurrent_runs: int = Field(1, ge=1)
    max_attempts: int = Field(5, ge=1)
    """Attempts without a newly committed task before a run fails."""
    capacity_wait_s: float = Field(5.0, ge=0)
    """How long a run waits for a cluster that is too small to grow before it fails with no_capacity."""
    worker_silence_s: float = Field(120.0, ge=5)
    """How long a training worker may say nothing, frozen or cut off, before its group is started anew."""
    poll_interval_s: float = Field(1.0, gt=0)
    reconcile: bool = True
    """Run the reconciler inside the API's process; False where `clpeft reconciler` runs beside it."""
    lease_s: float = Field(5.0, gt=0)
    """How long a reconciler that stopped keeps others from taking over."""
    stop_grace_s: float = Field(120.0, ge=0)
    """How long a paused, cancelled or late run may go on until Ray is told to end its processes."""
    keep_files_s: float = Field(3600.0, ge=0)
    """How long files that no version needs are kept after a run has ended."""
    owner_quota_bytes: int = Field(0, ge=0)
    """How much each owner may keep in storage, data sets and versions together; 0 is no limit."""
    owner_header: str = ""
    """HTTP header in which a proxy that you trust names the caller, such as X-Forwarded-User; places are
    shared fairly between owners. Empty: everything belongs to one owner."""

    @field_validator("storage_url")
    @classmethod
    def _is_known_storage(cls, url: str) -> str:
        protocol, found, _ = url.partition("://")
        if found and protocol not in fsspec.available_protocols():
            raise ValueError(
                f"{protocol}:// is no storage; give a folder, file:///folder or s3://bucket/folder"
            )
        return url

    @model_validator(mode="after")
    def _fill_defaults(self) -> Settings:
        fill = object.__setattr__  # frozen: the only place that writes
        fill(self, "home", self.home.expanduser().absolute())
        if not self.database_url:
            fill(self, "database_url", f"sqlite:///{self.home / 'clpeft.db'}")
        if not self.storage_url:
            fill(self, "storage_url", f"file://{self.home / 'storage'}")
        elif "://" not in self.storage_url:  # a folder, the same one wherever a process is started
            fill(self, "storage_url", f"file://{Path(self.storage_url).expanduser().absolute()}")
        if self.models_dir == Path():
            fill(self, "models_dir", self.home / "models")
        return self
