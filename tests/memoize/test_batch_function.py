"""A decorated batch function answers as the plain one, computes each item once, and says what cannot be."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import datetime
import gc
import math
import operator
import pickle
import weakref
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatcache import BatchFunctionError, cache_batch_variable, memoize_batch
from quatcache.errors import BatchLengthError, ConfigError
from quatcache.memoize.arguments import Call
from quatcache.memoize.bounds import Bounds
from quatcache.memoize.flights import Asker
from quatcache.memoize.values import Values

ITEMS = st.one_of(
    st.integers(-2, 3), st.booleans(), st.sampled_from([0.0, -0.0, 1.0, math.nan, "1", "a", b"a", None, (1,), (1.0,)])
)


class Recorder:
    """Doubles texts, and remembers the batches."""

    def __init__(self, answer=lambda batch: [str(item) for item in batch]):
        self.batches, self.answer = [], answer

    def __call__(self, batch):
        self.batches.append(list(batch))
        return self.answer(batch)

    @property
    def computed(self):
        return [item for batch in self.batches for item in batch]


def memoized(record, **settings):
    @memoize_batch("batch", **settings)
    def function(batch, extra=None):
        return record(batch)

    return function


# law 1: the answer is that of the function


@settings(deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.lists(ITEMS, max_size=8), st.sampled_from(["small", "large", 1, 1.0, True])), max_size=6
    ),
    maxsize=st.sampled_from([None, 0, 1, 3]),
    batch_size=st.sampled_from([None, 1, 2]),
)
def test_answer_is_that_of_the_plain_function(calls, maxsize, batch_size):
    def plain(batch, model):
        return [(type(item).__name__, repr(item), type(model).__name__, model) for item in batch]

    cached = memoize_batch("batch", maxsize=maxsize, batch_size=batch_size)(plain)
    for batch, model in calls:
        assert cached(batch, model) == plain(batch, model)
        assert cached(model=model, batch=batch) == plain(batch, model)


def test_each_distinct_item_is_computed_once_over_calls():
    record = Recorder()
    function = memoized(record)
    function(["a", "b"])
    function(["b", "c", "c"])
    assert record.batches == [["a", "b"], ["c"]]
    assert function.cache_info() == (1, 3, None, 3)


@pytest.mark.parametrize("nothing", [[], ()])
def test_empty_batch_calls_nothing(nothing):
    record = Recorder()
    assert memoized(record)(nothing) == [] and record.batches == []


def test_none_is_a_value():
    record = Recorder(lambda batch: [None for _ in batch])
    function = memoized(record)
    assert function(["a"]) == function(["a"]) == [None]
    assert record.batches == [["a"]]


def test_defaults_and_their_values_have_one_key():
    record = Recorder()
    function = memoized(record)
    function(["a"]), function(["a"], None), function(batch=["a"], extra=None)
    assert record.batches == [["a"]]
    function(["a"], extra=[1, 2]), function(["a"], extra=[1, 2])  # by its content
    assert len(record.batches) == 2


def test_default_that_changes_is_another_argument():
    options = [1]

    @memoize_batch("batch")
    def function(batch, options=options):
        return [item * options[0] for item in batch]

    assert function([2]) == [2]
    options[0] = 5
    assert function([2]) == [10]


def test_tuples_and_arrays_reach_the_function_as_they_are():
    seen = []

    @memoize_batch("batch")
    def function(batch):
        seen.append(batch)
        return [0 for _ in batch]

    function((1, 2))
    function(np.array([[1, 2], [3, 4]]))
    function(torch.eye(2))
    assert seen[0] == (1, 2)
    assert isinstance(seen[1], np.ndarray) and isinstance(seen[2], torch.Tensor)
    function(np.array([[3, 4], [5, 6]]))
    assert seen[3].tolist() == [[5, 6]]


@pytest.mark.parametrize("make", [list, collections.deque, np.array, torch.tensor], ids=lambda make: make.__name__)
def test_batch_that_changes_meanwhile_is_answered_as_it_was(make):
    batch, seen = make([1, 2, 3]), []

    @memoize_batch("numbers", batch_size=1)
    def function(numbers):
        (number,) = map(int, numbers)
        seen.append(number)
        batch[2 if number < 3 else 0] = 9
        return [-number]

    assert function(batch) == [-1, -2, -3] and seen == [1, 2, 3]
    assert function([9]) == [-9]


def test_function_may_empty_the_list_that_the_caller_gave():
    waiting = ["a", "b"]

    @memoize_batch("batch")
    def function(batch):
        waiting.clear()
        return [item.upper() for item in batch]

    assert function(waiting) == ["A", "B"] and function.cache_peek(["b"]) == {0: "B"}


def test_series_goes_by_its_elements_whatever_its_labels():
    pandas = pytest.importorskip("pandas")
    record = Recorder(lambda batch: [item.upper() for item in batch])
    function = memoized(record)
    function(["c"])
    assert function(pandas.Series(["a", "b", "c"], index=[2, 0, 1])) == ["A", "B", "C"]
    with pytest.raises(BatchFunctionError, match="a DataFrame; give a list of items"):
        function(pandas.DataFrame({"a": [1, 2], "b": [3, 4]}))


def test_order_of_further_arguments_is_none():
    record = []

    @memoize_batch("batch")
    def function(batch, **options):
        record.append(options)
        return batch

    function([1], a=1, b=2), function([1], b=2, a=1)
    assert len(record) == 1


# items


Named = collections.namedtuple("Named", "field")
NOON = datetime.datetime(2020, 1, 1, 12, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Named(1), Named(1.0)),
        (Named(0.0), Named(-0.0)),
        (frozenset([1]), frozenset([True])),
        (Decimal("1.0"), Decimal("1.00")),
        (complex(0, 0.0), complex(0, -0.0)),
        (range(0), range(1, 1)),
        (NOON, NOON.astimezone(datetime.timezone(datetime.timedelta(hours=1)))),
        (NOON.timetz(), NOON.astimezone(datetime.timezone(datetime.timedelta(hours=1))).timetz()),
    ],
)
def test_equal_items_that_a_function_can_tell_apart_are_two(one, other):
    assert one == other
    record = Recorder(lambda batch: list(map(repr, batch)))
    function = memoized(record)
    assert function([one, other]) == function([one, other]) == [repr(one), repr(other)]
    function([copy.deepcopy(one)])
    assert len(record.batches) == 1


@pytest.mark.parametrize("item", [complex(math.nan, 1), Decimal("nan"), Decimal("snan"), Named([1])])
def test_item_that_python_does_not_find_again_is_found(item):
    record = Recorder()
    function = memoized(record)
    function([item]), function([copy.copy(item)])
    assert len(record.batches) == 1


@pytest.mark.parametrize("make", [lambda: [1, 2], lambda: {"a": 1}, lambda: np.arange(3), lambda: torch.arange(3)])
def test_items_that_can_change_go_by_their_content(make):
    record = Recorder()
    function = memoized(record)
    function([make()]), function([make()])
    assert len(record.batches) == 1


def test_object_that_has_a_hash_goes_by_it():
    @dataclasses.dataclass(frozen=True)
    class Point:
        x: int

    record = Recorder()
    function = memoized(record)
    function([Point(1)]), function([Point(1)]), function([Point(2)])
    assert record.computed == [Point(1), Point(2)]


class Unhashable:
    __hash__ = None

    def __init__(self, number):
        self.number = number


def test_unhashable_items_need_a_key_function():
    record = Recorder()
    with pytest.raises(BatchFunctionError, match=r"item 1 of the batch is .*neither a hash nor bytes.*pass key="):
        memoized(record)(["a", Unhashable(1)])
    assert record.batches == []
    function = memoized(record, key=lambda item: item.number)
    function([Unhashable(1), Unhashable(1)]), function([Unhashable(1)])
    assert len(record.computed) == 1


def test_argument_without_a_key_is_named():
    with pytest.raises(BatchFunctionError, match=r"given extra=.*decides its answers and cannot be a key"):
        memoized(Recorder())(["a"], extra=Unhashable(1))


# rows


@pytest.mark.parametrize("maxsize", [None, 2])
@pytest.mark.parametrize("make", [np.stack, torch.stack], ids=["array", "tensor"])
def test_rows_come_back_as_they_were_given(make, maxsize):
    kind = np.array if make is np.stack else torch.tensor
    record = Recorder(lambda batch: kind([[float(item), 2.0 * item] for item in batch]))
    function = memoized(record, maxsize=maxsize)
    first = function([1, 2, 1])
    assert type(first) is type(kind([0.0])) and first.dtype == kind([0.0]).dtype and first.shape == (3, 2)
    again = function([2, 1])
    assert type(again) is type(first) and again.tolist() == [[2.0, 4.0], [1.0, 2.0]]
    assert record.batches == [[1, 2]]


def test_changing_an_answer_of_rows_changes_no_later_one():
    function = memoized(Recorder(lambda batch: np.ones((len(batch), 2))))
    function(["a"])[:] = 7
    assert function(["a"]).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("kept_as", [lambda rows: rows, list, tuple], ids=["rows", "list", "tuple"])
@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["array", "tensor"])
def test_rows_neither_keep_their_batch_alive_nor_change_with_it(make, kept_as):
    buffer = make((2, 3))
    function = memoized(Recorder(lambda batch: kept_as(buffer[: len(batch)])), maxsize=1)
    function(["a", "b"])
    buffer[:] = 7
    (row,) = function.cache_peek(["b"]).values()
    assert row.tolist() == [1.0] * 3
    assert row.base is None if make is np.ones else row.untyped_storage().nbytes() == row.nbytes


def test_array_or_tensor_of_its_own_is_kept_itself():
    values = [np.ones(3), torch.ones(3), torch.ones(3).to_sparse()]
    function = memoized(Recorder(lambda batch: values))
    assert all(map(operator.is_, function(["a", "b", "c"]), values))


@pytest.mark.parametrize("dtype", [object, "U3", "S3", "datetime64[s]", [("a", "i4"), ("b", "f8")]])
def test_arrays_of_what_is_no_number_keep_their_dtype(dtype):
    function = memoized(Recorder(lambda batch: np.array([1, 22, 333])[: len(batch)].astype(dtype)))
    first, again = function(["a", "b", "c"]), function(["c", "a"])
    assert first.dtype == again.dtype == np.dtype(dtype) and again.tolist() == first[[2, 0]].tolist()


@pytest.mark.parametrize("kind", [np.ma.masked_array, np.matrix, np.recarray])
def test_arrays_that_would_lose_what_they_are_are_refused(kind):
    function = memoized(Recorder(lambda batch: np.ones((len(batch), 2)).view(kind)))
    with pytest.raises(BatchFunctionError, match="return a list with one value per item, or an array"):
        function(["a"])


@pytest.mark.parametrize("gather", [torch.stack, list], ids=["tensor", "list"])
def test_tensor_with_a_graph_is_refused(gather):
    weight = torch.ones(2, requires_grad=True)
    function = memoized(Recorder(lambda batch: gather([weight * 2 for _ in batch])))
    with pytest.raises(BatchFunctionError, match=r"requires grad.*torch.no_grad"):
        function(["a"])


def test_rows_of_different_shapes_are_told():
    function = memoized(Recorder(lambda batch: np.ones((len(batch), len(batch)))))
    function(["a"])
    with pytest.raises(
        BatchFunctionError, match=r"rows of shapes \[\(1,\), \(2,\)\].*return rows of one shape, or a list"
    ):
        function(["a", "b", "c"])


def test_kind_of_an_answer_belongs_to_the_other_arguments():
    @memoize_batch("batch")
    def function(batch, as_array=False):
        return np.array(batch) if as_array else list(batch)

    assert function([1, 2]) == [1, 2]
    assert function([1, 2], as_array=True).tolist() == [1, 2]
    assert isinstance(function([1, 2]), list) and isinstance(function([1], as_array=True), np.ndarray)


# bad answers: one error each, nothing stored


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (lambda batch: batch[1:], BatchLengthError, "returned 1 values for 2 items; return one per item, in order"),
        (lambda batch: batch + batch, BatchLengthError, "returned 4 values for 2 items"),
        (lambda batch: (item for item in batch), BatchFunctionError, "a generator; return a list"),
        (lambda batch: dict.fromkeys(batch), BatchFunctionError, "a dict; return a list"),
        (lambda batch: "ab", BatchFunctionError, "returned 'ab', a str; return a list"),
        (lambda batch: None, BatchFunctionError, "returned None, a NoneType; return a list"),
        (lambda batch: np.float64(3), BatchFunctionError, "return a list"),
        (lambda batch: torch.tensor(3), BatchFunctionError, "without dimensions; return one row per item"),
    ],
)
def test_answer_that_is_no_batch_is_refused_and_not_kept(answer, error, said):
    record = Recorder(answer)
    function = memoized(record)
    with pytest.raises(error) as refused:
        function(["a", "b"])
    assert said in str(refused.value)
    assert function.cache_info().currsize == 0
    record.answer = list
    assert function(["a", "b"]) == ["a", "b"]


def test_answer_of_another_kind_than_before_is_refused():
    record = Recorder(list)
    function = memoized(record)
    function([1])
    record.answer = np.array
    with pytest.raises(BatchFunctionError, match="returned a ndarray, and a list before"):
        function([2])


@pytest.mark.parametrize("batch", ["abc", b"abc", {"a": 1}, {1, 2}, (item for item in "ab"), 3, None])
def test_what_is_no_batch_is_refused(batch):
    record = Recorder()
    with pytest.raises(BatchFunctionError, match="give a list of items"):
        memoized(record)(batch)
    assert record.batches == []


# errors of the function


def test_error_is_not_cached():
    calls = []

    @memoize_batch("batch")
    def function(batch):
        calls.append(batch)
        if len(calls) == 1:
            raise RuntimeError("boom")
        return batch

    with pytest.raises(RuntimeError, match="boom"):
        function([1])
    assert function([1]) == [1]


def test_stop_iteration_of_the_function_is_an_error_and_no_answer():
    def ends(batch):
        raise StopIteration

    with pytest.raises((StopIteration, RuntimeError)):
        memoized(ends)([1])


def test_finished_batches_are_kept_when_a_later_one_fails():
    record = Recorder()

    @memoize_batch("batch", batch_size=2)
    def function(batch):
        if "c" in batch:
            raise RuntimeError("boom")
        return record(batch)

    with pytest.raises(RuntimeError):
        function(["a", "b", "c", "d"])
    assert function(["b", "a"]) == ["b", "a"]
    assert record.batches == [["a", "b"]]


def test_batch_size_splits_what_is_missing():
    record = Recorder()
    function = memoized(record, batch_size=2)
    function(["a"])
    function(["a", "b", "c", "d"])
    assert record.batches == [["a"], ["b", "c"], ["d"]]


def test_function_may_call_itself():
    @memoize_batch("numbers")
    def fibonacci(numbers):
        return [n if n < 2 else sum(fibonacci([n - 1, n - 2])) for n in numbers]

    assert fibonacci([20, 3]) == [6765, 2]
    assert fibonacci.cache_info().currsize == 21


# bounds


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_values_expire():
    record, clock = Recorder(), Clock()
    function = memoized(record, ttl=10, time_func=clock)
    function(["a"])
    clock.now = 9
    function(["a", "b"])
    clock.now = 11
    function(["a", "b"])
    assert record.batches == [["a"], ["b"], ["a"]]


def test_values_expire_within_a_bound_as_well():
    record, clock = Recorder(), Clock()
    function = memoized(record, ttl=10, maxsize=1, time_func=clock)
    function(["a"]), function(["b"]), function(["b"])
    assert record.computed == ["a", "b"] and function.cache_info().currsize == 1
    clock.now = 11
    function(["b"])
    assert record.computed == ["a", "b", "b"]


@pytest.mark.parametrize("budget", [160, "160 B"])
def test_budget_in_bytes_counts_rows(budget):
    record = Recorder(lambda batch: np.zeros((len(batch), 10)))
    function = memoized(record, max_bytes=budget)
    function(["a", "b", "c"])
    assert function.cache_info() == (0, 3, 160, 160)
    function(["c", "b"])
    assert len(record.batches) == 1


def test_value_beyond_the_budget_is_answered_and_not_kept():
    function = memoized(Recorder(lambda batch: [b"x" * 100 for _ in batch]), max_bytes=50)
    assert function(["a"]) == [b"x" * 100]
    assert function.cache_info().currsize == 0


def test_sizes_may_be_measured_otherwise():
    function = memoized(Recorder(lambda batch: ["xx" for _ in batch]), max_bytes=5, getsizeof=len)
    function(["a", "b", "c"])
    assert function.cache_info().currsize == 4


def test_bound_is_over_all_other_arguments():
    record = Recorder()
    function = memoized(record, maxsize=2)
    for extra in range(5):
        function(["a"], extra)
    assert function.cache_info().currsize == 2


def test_other_arguments_of_which_no_value_is_left_are_forgotten():
    function = memoized(Recorder(), maxsize=2)
    for extra in range(2500):
        function(["a"], extra)
    assert len(function._values._contexts) < 1100
    assert function(["a"], 2499) == ["a"] and function.cache_info().hits == 1


def test_looking_for_many_other_arguments_loses_no_value():
    function = memoized(Recorder())
    function(["a"])
    for extra in range(1500):
        function.cache_peek(["a"], extra=extra)
    assert len(function._values._contexts) < 1100
    function(["a"])
    assert function.cache_info().hits == 1


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"maxsize": 3, "max_bytes": 5}, "both bound the cache; give one of them"),
        ({"maxsize": -1}, "maxsize is -1; give a number of values, at least 0"),
        ({"maxsize": 1.5}, "maxsize is 1.5"),
        ({"max_bytes": 0}, "max_bytes is 0; give a number of bytes, at least 1"),
        ({"max_bytes": "lots"}, "max_bytes: 'lots' is not a size"),
        ({"ttl": 0}, "ttl is 0; give seconds, more than 0"),
        ({"ttl": "5"}, "ttl is '5'; give seconds"),
        ({"key": "id"}, "key is 'id'; give a function from an item to what stands for it"),
        ({"batch_size": 0}, "batch_size is 0; give items per call, at least 1"),
        ({"getsizeof": len}, "max_bytes, which is not given; give both or neither"),
    ],
)
def test_settings_that_cannot_be_are_refused(bounds, said):
    with pytest.raises(ConfigError) as refused:
        memoized(Recorder(), **bounds)
    assert said in str(refused.value)


# looking and clearing


def test_peek_computes_and_touches_nothing():
    record = Recorder()
    function = memoized(record, maxsize=2)
    function(["a", "b"])
    assert function.cache_peek(["b", "c", "a"]) == {0: "b", 2: "a"}
    function(["c"])  # a was the least recently used, though it was looked at last
    assert function.cache_peek(["a", "b"]) == {1: "b"}
    assert record.batches == [["a", "b"], ["c"]] and function.cache_info().hits == 0
    assert function.cache_peek(["b"], extra=1) == {}


def test_clear_forgets_values_and_counts():
    record = Recorder()
    function = memoized(record)
    function(["a"])
    function.cache_clear()
    assert function.cache_info() == (0, 0, None, 0)
    record.answer = np.array  # another kind may follow
    assert isinstance(function(["a"]), np.ndarray)


def test_clearing_while_rows_are_computed_leaves_them_rows():
    def answer(batch):
        if function.cache_info().misses == 0 and batch == ["a"]:
            function.cache_clear()
        return np.array(batch)

    record = Recorder(answer)
    function = memoized(record)
    assert isinstance(function(["a"]), np.ndarray)
    assert isinstance(function(["a"]), np.ndarray) and len(record.batches) == 1


def test_clearing_before_a_coroutine_starts_leaves_its_rows_rows():
    @memoize_batch("batch")
    async def function(batch):
        return np.array(batch)

    async def main():
        coroutine = function([1])
        function.cache_clear()
        return await coroutine, await function([1])

    assert [type(one) for one in asyncio.run(main())] == [np.ndarray] * 2


def test_clearing_between_a_computation_and_its_end_leaves_its_kind_known():
    values, call = Values(Bounds()), Call(["a"], (), (), {}, 0)
    values.store.claim(["a"], Asker())
    values.context(call).kind = np.ndarray
    values.clear()
    assert values.context(call).kind is np.ndarray


def test_coroutine_that_is_older_than_the_cache_returns_what_newer_calls_do():
    kinds = [list]

    @memoize_batch("batch")
    async def function(batch):
        return kinds[-1](batch)

    async def main():
        await function([0])
        coroutine = function([1])
        function.cache_clear()
        kinds.append(np.array)
        await function([2])
        kinds.append(list)
        with pytest.raises(BatchFunctionError, match="returned a list, and a ndarray before"):
            await coroutine

    asyncio.run(main())


# methods


class Model:
    def __init__(self, factor):
        self.factor, self.batches = factor, []

    @memoize_batch("batch", maxsize=10)
    def predict(self, batch, offset=0):
        self.batches.append(list(batch))
        return [item * self.factor + offset for item in batch]

    def __eq__(self, other):  # instances that are equal, and have no hash
        return True


def test_each_instance_has_its_own_values():
    two, three = Model(2), Model(3)
    assert two.predict([1, 2]) == [2, 4] and three.predict([1, 2]) == [3, 6]
    assert two.predict([2], offset=1) == [5]
    assert two.batches == [[1, 2], [2]] and three.batches == [[1, 2]]
    assert Model.predict(two, [1]) == [2] and len(two.batches) == 2
    assert two.predict.cache_info() == (1, 3, 10, 3) and three.predict.cache_info().currsize == 2
    assert two.predict.cache_peek([1, 7]) == {0: 2}


def test_clearing_an_instance_leaves_the_others():
    two, three = Model(2), Model(3)
    two.predict([1]), three.predict([1])
    two.predict.cache_clear()
    assert two.predict.cache_info().currsize == 0 and three.predict.cache_info().currsize == 1


def test_cache_keeps_no_instance_alive():
    model = Model(2)
    model.predict([1])
    before, reference = len(Model.predict._instances), weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None and len(Model.predict._instances) == before - 1


def test_method_below_another_decorator_keeps_no_instance_alive():
    class Network:
        @torch.no_grad()
        @memoize_batch("batch")
        def predict(self, batch):
            return [id(self) for _ in batch]

        def __eq__(self, other):
            return True

    one, two = Network(), Network()
    assert one.predict([1]) == [id(one)] and two.predict([1]) == [id(two)]
    reference = weakref.ref(one)
    del one
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_decorator_above_that_of_the_class_is_refused(kind):
    with pytest.raises(BatchFunctionError, match=f"put @{kind.__name__} above the decorator that caches"):
        memoize_batch("batch")(kind(lambda *given: given))


@pytest.mark.parametrize("decorator", [memoize_batch, cache_batch_variable])
def test_decorator_without_the_name_of_the_batch_is_refused_at_once(decorator):
    with pytest.raises(BatchFunctionError, match=r"is no name of an argument; write @memoize_batch\('texts'\)"):

        @decorator
        def function(texts):
            return texts


def test_instances_that_cannot_be_referred_to_are_refused():
    class Slots:
        __slots__ = ()

        @memoize_batch("batch")
        def predict(self, batch):
            return batch

    with pytest.raises(BatchFunctionError, match="add '__weakref__' to its __slots__, or decorate a function"):
        Slots().predict([1])


def test_class_and_static_methods():
    class Holder:
        @classmethod
        @memoize_batch("batch")
        def of_class(cls, batch):
            return [cls.__name__ for _ in batch]

        @staticmethod
        @memoize_batch("batch")
        def of_none(batch):
            return [item + 1 for item in batch]

    class Other(Holder):
        pass

    assert Holder.of_class([1]) == ["Holder"] and Other.of_class([1]) == ["Other"]
    assert Holder.of_none([1]) == Holder().of_none([1]) == [2]


# as an object


@memoize_batch("batch")
def at_the_top(batch):
    return batch


def test_travels_by_name_and_is_never_copied():
    assert pickle.loads(pickle.dumps(at_the_top)) is at_the_top
    assert copy.deepcopy(at_the_top) is copy.copy(at_the_top) is at_the_top
    assert repr(at_the_top) == "<memoized at_the_top>"
