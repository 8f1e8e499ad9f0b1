"""``python -m quatcache.cli`` is ``quatcache``."""

from __future__ import annotations

from quatcache.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
