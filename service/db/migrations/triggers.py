"""Triggers that keep final rows as they are, whoever writes: a second line behind the code's own checks.

A migration that rebuilds one of these tables on SQLite loses them there and creates them again.
"""

from __future__ import annotations

from alembic import op

FINAL_RUNS = "'succeeded', 'failed', 'cancelled'"
FINAL_ATTEMPTS = "'succeeded', 'failed', 'cancelled', 'paused', 'lost'"
RULES = {
    # A final run changes in one column: when its left-over files were removed.
    "runs": (
        f"OLD.state IN ({FINAL_RUNS}) AND (NEW.state <> OLD.state OR NEW.job_id <> OLD.job_id"
        " OR coalesce(NEW.reason, '') <> coalesce(OLD.reason, '')"
        " OR coalesce(NEW.message, '') <> coalesce(OLD.message, ''))",
        "a run that has ended cannot change",
    ),
    # Events of an ended attempt may still be read.
    "attempts": (
        f"OLD.state IN ({FINAL_ATTEMPTS}) AND (NEW.state <> OLD.state OR NEW.run_id <> OLD.run_id"
        " OR coalesce(NEW.reason, '') <> coalesce(OLD.reason, '')"
        " OR coalesce(NEW.message, '') <> coalesce(OLD.message, ''))",
        "an attempt that has ended cannot change",
    ),
    "tasks": (
        "OLD.state = 'committed' AND (NEW.state <> OLD.state OR NEW.run_id <> OLD.run_id"
        " OR coalesce(NEW.version, 0) <> coalesce(OLD.version, 0))",
        "a committed task cannot change",
    ),
    "adapter_versions": ("OLD.version IS NOT NULL", "a version never changes"),
    "events": ("OLD.id IS NOT NULL", "an event never changes"),
}


def create_triggers() -> None:
    """Create one trigger per table of RULES."""
    for table, (condition, text) in RULES.items():
        if op.get_bind().dialect.name == "postgresql":
            op.execute(
                f"CREATE FUNCTION {table}_are_final() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION '{text}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
            )
            op.execute(
                f"CREATE TRIGGER {table}_are_final BEFORE UPDATE ON {table} FOR EACH ROW "
                f"WHEN ({condition}) EXECUTE FUNCTION {table}_are_final()"
            )
        else:
            op.execute(
                f"CREATE TRIGGER {table}_are_final BEFORE UPDATE ON {table} FOR EACH ROW "
                f"WHEN {condition} BEGIN SELECT RAISE(ABORT, '{text}'); END"
            )


def drop_triggers() -> None:
    """Drop what create_triggers made."""
    for table in RULES:
        if op.get_bind().dialect.name == "postgresql":
            op.execute(f"DROP TRIGGER {table}_are_final ON {table}")
            op.execute(f"DROP FUNCTION {table}_are_final()")
        else:
            op.execute(f"DROP TRIGGER {table}_are_final")
