"""Errors: one base, a builtin parent each, a message that reads as a sentence."""

from __future__ import annotations

import builtins
import pickle

import pytest

from quatcache import errors
from quatcache.errors import CacheMissError, QuatcacheError, shorten

CLASSES = [value for name in errors.__all__ if isinstance(value := getattr(errors, name), type)]


def test_every_error_class_is_exported():
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(CLASSES)


@pytest.mark.parametrize("error", [error for error in CLASSES if error is not QuatcacheError])
def test_every_error_is_caught_as_ours_and_as_a_builtin(error):
    if len(error.__bases__) == 1:  # a kind of another error of ours, which is looked at itself
        (error,) = error.__bases__
    ours, builtin = error.__bases__
    assert issubclass(ours, QuatcacheError)  # one with a builtin of its own may be a kind of another
    assert getattr(builtins, builtin.__name__) is builtin and builtin is not Exception


@pytest.mark.parametrize("error", CLASSES)
def test_message_prints_as_written_and_survives_workers(error):
    original = error("31 values for 32 items; return one per item.")
    assert str(original) == "31 values for 32 items; return one per item."
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is error and str(copy) == str(original)


def test_miss_without_message_prints():
    assert str(CacheMissError()) == ""


@pytest.mark.parametrize(("value", "shown"), [("a", "'a'"), (["x"], "['x']"), ("b" * 78, "'" + "b" * 78 + "'")])
def test_short_values_are_shown_whole(value, shown):
    assert shorten(value) == shown


def test_value_that_cannot_be_shown_does_not_hide_the_message():
    assert shorten(10**5000).startswith("<int object at ")


def test_long_values_are_cut_at_80_characters():
    assert shorten("b" * 79) == "'" + "b" * 76 + "..."
    assert len(shorten(list(range(1000)))) == 80
