"""``python -m fused_arcface`` and the console script ``fused-arcface``."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its status."""
    from .app.cli import run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
