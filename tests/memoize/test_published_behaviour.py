"""What batche promises in its README, sentence by sentence; and what it gets wrong."""

from __future__ import annotations

from typing import Any, List  # noqa: UP035  # as people annotated once

import pytest

from quatcache import BatchFunctionError, QuatcacheError, cache_batch_variable


def recording(maxsize=None):
    """A decorated function, and the batches that it was called with."""
    batches = []

    @cache_batch_variable(batch_variable_name="batch_items", maxsize=maxsize)
    def upper(batch_items: List[str]) -> List[str]:  # noqa: UP006
        batches.append(list(batch_items))
        return [item.upper() for item in batch_items]

    return upper, batches


def test_the_example_of_the_readme():
    upper, batches = recording(maxsize=100)
    assert upper(["hello", "world"]) == ["HELLO", "WORLD"]
    assert upper(["hello", "again"]) == ["HELLO", "AGAIN"]
    assert batches == [["hello", "world"], ["again"]]


def test_same_batch_again_is_fetched_from_the_cache():
    upper, batches = recording()
    assert upper(["a", "b"]) == upper(["a", "b"]) == ["A", "B"]
    assert batches == [["a", "b"]]


def test_without_a_maxsize_everything_is_kept():
    upper, batches = recording()
    many = [str(number) for number in range(5000)]
    upper(many)
    upper(many[::-1])
    assert len(batches) == 1


def test_with_a_maxsize_the_least_recently_used_go():
    upper, batches = recording(maxsize=2)
    upper(["a", "b"])
    upper(["a"])  # b is now the one that was not used for longest
    upper(["c"])
    assert upper(["a"]) == ["A"] and len(batches) == 2
    upper(["b"])
    assert batches[-1] == ["b"]


def test_batch_larger_than_maxsize_is_answered_whole():
    upper, _ = recording(maxsize=2)
    assert upper(list("abcde")) == list("ABCDE")


@pytest.mark.parametrize("maxsize", [None, 10])
def test_batch_may_be_positional_or_named_or_among_kwargs(maxsize):
    batches = []

    @cache_batch_variable("items", maxsize)
    def named(offset, items):
        batches.append(items)
        return [item + offset for item in items]

    assert named(1, [1, 2]) == named(1, items=[1, 2]) == named(items=[1, 2], offset=1) == [2, 3]
    assert batches == [[1, 2]]

    @cache_batch_variable("items", maxsize)
    def open_ended(**kwargs):
        batches.append(kwargs["items"])
        return [item * kwargs.get("factor", 1) for item in kwargs["items"]]

    assert open_ended(items=[3]) == open_ended(items=[3]) == [3]
    assert open_ended(factor=2, items=[3]) == [6]
    assert batches[1:] == [[3], [3]]


def test_methods_are_cached():
    class Model:
        def __init__(self):
            self.batches = []

        @cache_batch_variable("batch")
        def predict(self, batch):
            self.batches.append(batch)
            return [item * 2 for item in batch]

    model = Model()
    assert model.predict([1, 2]) == model.predict(batch=[1, 2]) == [2, 4]
    assert model.predict([2, 3]) == [4, 6]
    assert model.batches == [[1, 2], [3]]


def wrong_batch(batch: str) -> list:
    return [batch]


def wrong_answer(batch: list) -> str:
    return str(batch)


def wrong_mapping(batch: dict[str, int]) -> list:
    return list(batch)


@pytest.mark.parametrize(
    ("function", "said"),
    [(wrong_batch, "takes <class 'str'> as 'batch'"), (wrong_answer, "returns <class 'str'>"), (wrong_mapping, "dict")],
)
def test_annotations_that_name_no_list_are_refused(function, said):
    with pytest.raises(BatchFunctionError, match="by its annotation") as refused:
        cache_batch_variable("batch")(function)
    assert said in str(refused.value)


def plain(batch: list) -> list:
    return batch


def old_style(batch: List[int]) -> List[Any]:  # noqa: UP006
    return batch


def as_text(batch: list[int]) -> list[str]:  # this module reads all annotations as strings
    return [str(item) for item in batch]


def not_annotated(batch):
    return batch


@pytest.mark.parametrize("function", [plain, old_style, as_text, not_annotated])
def test_lists_and_no_annotations_are_accepted(function):
    assert len(cache_batch_variable("batch")(function)([1, 2])) == 2


def test_argument_that_the_function_lacks_is_refused():
    with pytest.raises(BatchFunctionError, match=r"has no argument 'items' to take the batch; name one that it has"):
        cache_batch_variable("items")(not_annotated)


def test_call_without_the_batch_is_refused():
    with pytest.raises(BatchFunctionError, match="was called without 'batch'; give it a list of items"):
        cache_batch_variable("batch")(not_annotated)()


def test_wrong_number_of_values_is_refused_and_not_kept():
    calls = []

    @cache_batch_variable("batch")
    def short(batch):
        calls.append(batch)
        return batch[:-1] if len(calls) == 1 else batch

    with pytest.raises(BatchFunctionError, match="returned 1 values for 2 items"):
        short([1, 2])
    assert short([1, 2]) == [1, 2]
    assert calls == [[1, 2], [1, 2]]


def test_one_class_of_error_for_every_misuse():
    assert issubclass(BatchFunctionError, QuatcacheError)
    for misuse in (
        lambda: cache_batch_variable("items")(not_annotated),
        lambda: cache_batch_variable("batch")(wrong_batch),
        lambda: cache_batch_variable("batch")(not_annotated)(),
        lambda: cache_batch_variable("batch")(lambda batch: batch[1:])([1]),
    ):
        with pytest.raises(BatchFunctionError):
            misuse()


def test_name_and_docstring_stay():
    @cache_batch_variable("batch")
    def documented(batch):
        """Say what it does."""
        return batch

    assert documented.__name__ == "documented" and documented.__doc__ == "Say what it does."
    assert documented.__wrapped__([1]) == [1]


# what batche gets wrong


def test_changed_other_argument_is_a_miss():
    @cache_batch_variable("batch")
    def scaled(batch, factor=1):
        return [item * factor for item in batch]

    assert scaled([1, 2]) == [1, 2]
    assert scaled([1, 2], 3) == scaled([1, 2], factor=3) == [3, 6]
    assert scaled([1, 2], factor=1) == [1, 2]


def test_duplicates_in_a_call_are_computed_once():
    upper, batches = recording()
    assert upper(["a", "b", "a", "a"]) == ["A", "B", "A", "A"]
    assert batches == [["a", "b"]]
