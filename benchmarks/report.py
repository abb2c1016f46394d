"""What every benchmark imports for --json OUT; the code is in service, where the installed demo finds it."""

from service.report import environment, target, write_report

__all__ = ["environment", "target", "write_report"]
