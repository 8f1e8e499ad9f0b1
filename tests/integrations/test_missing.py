"""Without the package that it is named after, an integration stops at the door and names the extra."""

from __future__ import annotations

import importlib
import sys

import pytest

from quatcache.errors import MissingDependencyError


@pytest.mark.parametrize(
    ("name", "package", "told"),
    [
        ("sklearn", "sklearn.base", r"scikit-learn is not installed: pip install 'quatcache\[sklearn\]'"),
        (
            "langchain",
            "langchain_core.embeddings",
            r"langchain-core is not installed: pip install 'quatcache\[langchain\]'",
        ),
        ("datasets", "datasets", r"datasets is not installed: pip install 'quatcache\[datasets\]'"),
    ],
)
def test_the_error_names_the_extra(monkeypatch, name, package, told):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"quatcache.integrations.{name}", raising=False)
    with pytest.raises(MissingDependencyError, match=told):
        importlib.import_module(f"quatcache.integrations.{name}")
