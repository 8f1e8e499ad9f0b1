"""Keys: equal exactly for equal content, in every process; found again without a Python object per key."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, make_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quatcache import keys as keys_module
from quatcache.errors import KeyTypeError
from quatcache.keys import KeyIndex, content_keys, distinct, extracted_keys, index_keys, index_salt


@dataclass
class Caption:
    text: str
    size: int


@dataclass
class Title:
    text: str
    size: int


class Opaque:
    pass


Pair = namedtuple("Pair", "left right")


def key(item):
    (row,) = content_keys([item])
    return tuple(row.tolist())


def palette_image(colours, **info):
    image = Image.new("P", (2, 1))
    image.putdata([0, 1])
    image.putpalette(colours)
    image.info.update(info)
    return image


def rotated(orientation):
    image = Image.new("RGB", (2, 1))
    image.getexif()[0x0112] = orientation
    return image


RECORD = [("a", "<i4"), ("b", "<f4")]

# Each of these is other content than every other one.
DIFFERENT = {
    "int": 1,
    "float": 1.0,
    "true": True,
    "text": "1",
    "bytes": b"1",
    "complex": 1 + 0j,
    "none": None,
    "false": False,
    "zero": 0,
    "zero-float": 0.0,
    "empty-text": "",
    "empty-bytes": b"",
    "None-text": "None",
    "minus": -1,
    "hex": 16,
    "ten": 10,
    "huge": 10**5000,
    "huger": 10**5000 + 1,
    "infinity": float("inf"),
    "nan": float("nan"),
    "surrogate-pair": "\ud800\udc00",
    "astral": "\U00010000",
    "nul": "a\0",
    "letter": "a",
    "empty-tuple": (),
    "empty-list": [],
    "empty-dict": {},
    "tuple": (1, 2),
    "list": [1, 2],
    "tuple-of-tuple": ((1, 2),),
    "split-ab-c": ("ab", "c"),
    "split-a-bc": ("a", "bc"),
    "split-none": ("abc",),
    "split-empty": ("abc", ""),
    "nested-left": (("a", "b"), "c"),
    "nested-right": ("a", ("b", "c")),
    "flat": ("a", "b", "c"),
    "tuple-of-text": ("1",),
    "tuple-of-int": (1,),
    "tuple-of-true": (True,),
    "tuple-of-float": (1.0,),
    "dict": {"a": 1},
    "dict-bool": {"a": True},
    "dict-other-name": {"b": 1},
    "dict-two": {"a": 1, "b": 2},
    "dict-other-order": {"b": 2, "a": 1},
    "dict-swapped": {"a": 2, "b": 1},
    "dict-int-name": {1: "a"},
    "dict-as-list": [("a", 1)],
    "dataclass": Caption("a", 1),
    "other-class": Title("a", 1),
    "other-field": Caption("a", 2),
    "other-names": make_dataclass("Caption", ["text", "width"])("a", 1),
    "as-dict": {"text": "a", "size": 1},
    "tensor": torch.tensor([1.0, 2.0]),
    "tensor-2d": torch.tensor([[1.0, 2.0]]),
    "tensor-column": torch.tensor([[1.0], [2.0]]),
    "tensor-double": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "tensor-int": torch.tensor([1, 2]),
    "tensor-bits": torch.tensor([1.0, 2.0]).view(torch.int32),
    "tensor-bf16": torch.tensor([1.0, 2.0]).bfloat16(),
    "tensor-f16": torch.tensor([1.0, 2.0]).half(),
    "tensor-bool": torch.tensor([True, False]),
    "tensor-uint8": torch.tensor([1, 0], dtype=torch.uint8),
    "tensor-0d": torch.tensor(1.0),
    "tensor-1": torch.tensor([1.0]),
    "tensor-empty": torch.empty(0),
    "tensor-empty-2d": torch.empty(0, 2),
    "tensor-conjugate": torch.tensor([1 + 2j]).conj(),
    "tensor-complex": torch.tensor([1 + 2j]),
    "array": np.array([1.0, 2.0]),
    "array-f4": np.array([1.0, 2.0], "<f4"),
    "array-big-endian": np.array([1.0, 2.0], ">f8"),
    "array-2d": np.array([[1.0, 2.0]]),
    "array-text": np.array(["a", "b"]),
    "numpy-float": np.float32(1),
    "numpy-bool": np.True_,
    "days": np.array([1, 2], "M8[D]"),
    "seconds": np.array([1, 2], "M8[s]"),
    "numpy-int": np.int64(1),
    "numpy-double": np.float64(1),
    "record": np.zeros(2, RECORD),
    "record-swapped": np.zeros(2, [("b", "<f4"), ("a", "<i4")]),
    "record-renamed": np.zeros(2, [("a", "<i4"), ("c", "<f4")]),
    "image": Image.new("RGB", (2, 1)),
    "image-turned": Image.new("RGB", (1, 2)),
    "image-grey": Image.new("L", (2, 1)),
    "image-other": Image.new("RGB", (2, 1), (0, 0, 1)),
    "image-ints": Image.new("I", (2, 1)),
    "image-floats": Image.new("F", (2, 1)),
    "image-palette": palette_image([0, 0, 0, 9, 9, 9]),
    "image-repainted": palette_image([0, 0, 0, 9, 9, 8]),
    "image-transparent": palette_image([0, 0, 0, 9, 9, 9], transparency=1),
    "image-rotated": rotated(6),
}


def test_different_content_has_different_keys():
    keys = content_keys(list(DIFFERENT.values()))
    names = {}
    for name, row in zip(DIFFERENT, keys.tolist(), strict=True):
        assert names.setdefault(tuple(row), name) == name
    assert keys.shape == (len(DIFFERENT), 2) and keys.dtype == np.int64


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, OrderedDict(a=1)),
        ({"a": 1}, UserDict(a=1)),
        ((1, 2), Pair(1, 2)),
        (b"ab", bytearray(b"ab")),
        (b"ab", memoryview(b"xaxb")[1::2]),
        ("a", np.str_("a")),
        (("a",), (np.str_("a"),)),
        (b"a", np.bytes_(b"a")),
        (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
        (np.arange(3), np.arange(6)[::-2][::-1] // 2),
        (torch.arange(3), torch.arange(6)[::2] // 2),
        (torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).t().contiguous().t()),
        (torch.tensor([3.0]), torch.arange(10.0).reshape(2, 5)[:1, 3]),
        (torch.tensor([-2.0]), torch.tensor([1 + 2j]).conj().imag),
        (torch.tensor([1 - 2j]), torch.tensor([1 + 2j]).conj()),
        (torch.tensor([1.0]), torch.nn.Parameter(torch.tensor([1.0]))),
        (Caption("a", 1), Caption("a", 1)),
        (palette_image([0, 0, 0, 9, 9, 9]), palette_image([0, 0, 0, 9, 9, 9])),
        (10**5000, 10**4999 * 10),
    ],
    ids=lambda value: type(value).__name__,
)
def test_equal_content_has_equal_keys(one, other):
    assert key(one) == key(other)
    assert key([one]) == key([other])


def test_text_keeps_its_key_among_other_items():
    # a batch of texts takes a faster way
    assert content_keys(["a", "b"]).tolist() == content_keys(["a", "b", 1])[:2].tolist()


def test_array_and_tensor_of_a_slice_are_hashed_without_the_rest():
    whole = torch.arange(10)
    assert key(whole[2:4]) == key(torch.tensor([2, 3]))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
content = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=10,
)


def canonical(item):
    """An object that tells content apart by Python's own rules, types included."""
    if isinstance(item, list | tuple):
        return type(item).__name__, tuple(canonical(element) for element in item)
    if isinstance(item, dict):
        return "dict", tuple((canonical(name), canonical(value)) for name, value in item.items())
    return type(item).__name__, item.hex() if isinstance(item, float) else item


@given(st.lists(content, min_size=2, max_size=6))
@settings(max_examples=150, deadline=None)
def test_keys_are_equal_exactly_for_equal_content(items):
    keys = [tuple(row) for row in content_keys(items).tolist()]
    wholes = [canonical(item) for item in items]
    for one in range(len(items)):
        for other in range(one):
            assert (keys[one] == keys[other]) == (wholes[one] == wholes[other])


extractable = st.recursive(plain, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@given(st.lists(extractable, min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_extracted_keys_are_equal_exactly_for_equal_values_and_never_content_keys(values):
    keys = [tuple(row) for row in extracted_keys(values).tolist()]
    wholes = [canonical(value) for value in values]
    for one in range(len(values)):
        for other in range(one):
            assert (keys[one] == keys[other]) == (wholes[one] == wholes[other])
    assert not set(keys) & {tuple(row) for row in content_keys(values).tolist()}


def test_keys_are_the_same_in_every_process():
    code = (
        "import sys; from quatcache.keys import content_keys, extracted_keys, index_keys; import numpy as np, torch\n"
        "items = ['gloss', b'x', 3, 0.5, None, {'b': 1, 'a': (2, [True])}, np.arange(3), torch.ones(2).bfloat16()]\n"
        "print(content_keys(items).tolist(), extracted_keys([('a', 1)]).tolist(), index_keys([4], b's').tolist())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    # a change of these numbers makes every cache of every user worthless: raise the format version with it
    assert content_keys(["gloss"]).tolist() == [GOLDEN["text"]]
    assert content_keys([{"b": 1, "a": (2, [True, 0.5, None, b"x"])}]).tolist() == [GOLDEN["nested"]]
    assert content_keys([torch.ones(2).bfloat16()]).tolist() == [GOLDEN["tensor"]]
    assert extracted_keys([("a", 1)]).tolist() == [GOLDEN["extracted"]]


GOLDEN = {
    "text": [1326100190753365876, 2676618588108635406],
    "nested": [3251410893182531538, -6500495930280157633],
    "tensor": [-5311266524106752765, 5408721862096063840],
    "extracted": [-8974311872465756078, 1206412449363819065],
}


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (Opaque(), "Opaque"),
        ({1, 2}, "set"),
        (Caption, "type"),
        (("text", [Opaque()]), "Opaque"),
        ({"x": object()}, "object"),
        (np.array([Opaque()]), "dtype object"),
        (np.zeros(1, [("a", "O")]), "dtype"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_item_without_canonical_bytes_is_refused_by_name(item, named):
    with pytest.raises(KeyTypeError, match=named):
        content_keys(["fine", item])


def test_item_within_itself_is_refused():
    item = ["text"]
    item.append(item)
    with pytest.raises(KeyTypeError, match="a list nested too deeply, or within itself"):
        content_keys([item])


@pytest.mark.parametrize(
    "value", [[1], {"a": 1}, np.int64(1), np.float64(1.0), np.str_("a"), Opaque(), bytearray(b"a"), torch.tensor(1)]
)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: ("a", (value,))], ids=["alone", "nested"])
def test_extracted_value_of_another_type_is_refused(value, wrap):
    with pytest.raises(KeyTypeError, match=rf"holds a {type(value).__name__}; return str, bytes, int"):
        extracted_keys([wrap(value)])


def test_no_items_have_no_keys():
    for keys in (content_keys([]), extracted_keys([]), index_keys([], b"")):
        assert keys.shape == (0, 2) and keys.dtype == np.int64


def test_index_keys_belong_to_one_salt():
    one, other = index_salt(), index_salt()
    assert one != other
    assert index_keys([1, 2], one).tolist() == index_keys(np.array([1, 2]), one).tolist()
    keys = np.concatenate([index_keys(range(100), one), index_keys(range(100), other)])
    assert len({tuple(row) for row in keys.tolist()}) == 200


def test_salt_leaves_random_states_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    index_salt()
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_single_keys_are_found_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = KeyIndex()
        index.add(content_keys(["a"]), np.array([0]))
        torch.from_numpy(content_keys(["a"]))
        assert index.find(content_keys(["a"])).tolist() == [0]


# The index ---------------------------------------------------------------------------------------------------------

# few first words, so that keys often share theirs
words = st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1])
some_keys = st.lists(st.tuples(words, words), max_size=12)


def as_keys(pairs):
    return np.array(pairs, np.int64).reshape(-1, 2)


@given(
    adds=st.lists(st.tuples(st.lists(st.tuples(words, words), max_size=8), st.booleans()), max_size=10),
    asked=some_keys,
    block=st.sampled_from([2, 5, 1 << 16]),
    few=st.sampled_from([0, 3, 64]),  # one by one, or many at once
)
@settings(max_examples=300, deadline=None)
def test_index_finds_what_a_dict_finds(adds, asked, block, few):
    index, model, row = KeyIndex(), {}, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "_BLOCK", block)
        patch.setattr(keys_module, "_FEW", few)
        for pairs, look in adds:
            index.add(as_keys(pairs), np.arange(row, row + len(pairs)))
            model.update(zip(pairs, range(row, row + len(pairs)), strict=True))
            row += len(pairs)
            if look:
                assert len(index) == len(model)
                assert index.find(as_keys(asked)).tolist() == [model.get(pair, -1) for pair in asked]
        check_index(index, model, asked)


def check_index(index, model, asked):
    keys, rows = index.items()
    assert rows.tolist() == sorted(model.values())  # in the order in which they were last added
    assert dict(zip(map(tuple, keys.tolist()), rows.tolist(), strict=True)) == model and len(keys) == len(model)
    assert index.find(as_keys(asked)).tolist() == [model.get(pair, -1) for pair in asked]


def test_index_filled_or_changed_a_key_at_a_time_is_seldom_made_anew(monkeypatch):
    made = []
    monkeypatch.setattr(KeyIndex, "_make_room", count_calls(KeyIndex._make_room, made))
    index = KeyIndex()
    keys = content_keys([str(number) for number in range(1000)])
    for place in range(1000):
        index.add(keys[place : place + 1], np.array([place]))
        assert index.find(keys[[place // 2, place]]).tolist() == [place // 2, place]
    assert index.find(keys).tolist() == list(range(1000)) and len(made) <= 20
    for again in range(1000):
        index.add(keys[:1], np.array([1000 + again]))
        assert index.find(keys[:2]).tolist() == [1000 + again, 1]
    assert len(made) <= 25 and len(index) == 1000 and max(made) <= 2000


def count_calls(method, made):
    def counted(index, entries):
        made.append(entries)
        method(index, entries)

    return counted


@pytest.mark.parametrize(
    "pairs",
    [[(number, number) for number in range(5000)], [(7, number << 40) for number in range(5000)]],
    ids=["words alike", "one first word"],
)
def test_index_is_quick_for_keys_that_are_no_hashes(pairs, monkeypatch):
    rounds = []
    look = KeyIndex._held
    monkeypatch.setattr(KeyIndex, "_held", lambda index, places: rounds.append(len(places)) or look(index, places))
    index = KeyIndex()
    index.add(as_keys(pairs), np.arange(len(pairs)))
    assert index.find(as_keys(pairs)).tolist() == list(range(len(pairs)))
    assert len(rounds) < 200


def test_index_that_was_interrupted_takes_in_the_rest_later(monkeypatch):
    keys = content_keys([str(number) for number in range(300)])
    index = KeyIndex()
    index.add(keys[:100], np.arange(100))
    assert len(index) == 100
    index.add(keys[100:], np.arange(100, 300))
    for name in ("_make_room", "_place", "_held"):
        with monkeypatch.context() as patch:
            patch.setattr(KeyIndex, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                index.find(keys)
    assert index.find(keys).tolist() == list(range(300)) and len(index) == 300


def interrupted(*arguments):
    raise KeyboardInterrupt


@given(some_keys)
@settings(max_examples=300, deadline=None)
def test_distinct_keeps_first_occurrences_in_order(pairs):
    firsts, which = distinct(as_keys(pairs))
    unique = list(dict.fromkeys(pairs))
    assert firsts.tolist() == [pairs.index(pair) for pair in unique]
    assert which.tolist() == [unique.index(pair) for pair in pairs]
    assert firsts.dtype == which.dtype == np.int64
