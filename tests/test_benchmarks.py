"""The benchmarks: contenders that train alike, and bars that are held or missed by the figures alone."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.__main__ import CONTENDERS as TIMED
from benchmarks.epochs import CONTENDERS, SHAPES, losses_of, make_data, run
from benchmarks.report import Bar, write_json

ROWS, EPOCHS = 2_100, 2  # the last batch is short in both shapes


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contender", sorted(set(CONTENDERS) - {"raw"}))
def test_contender_has_the_losses_of_the_raw_loop_bit_for_bit(shape, contender):
    reference = losses_of("raw", shape, ROWS, EPOCHS)
    steps = -(-ROWS // SHAPES[shape].batch_size)
    assert reference.shape == (EPOCHS * steps,)
    assert torch.equal(losses_of(contender, shape, ROWS, EPOCHS), reference)


def test_losses_fall_so_that_equal_losses_mean_equal_training():
    losses = losses_of("raw", "mlp", ROWS, 4)
    assert losses[-5:].mean() < losses[:5].mean()


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_epoch_but_the_first_is_timed(contender):
    seconds = run(contender, "linear", ROWS, epochs=3)
    assert len(seconds) == 2
    assert all(took > 0 for took in seconds)


def test_data_are_the_same_in_every_process():
    assert torch.equal(make_data(50).rows, make_data(50).rows)


def test_every_timed_contender_exists_and_the_losses_of_all_are_compared_with_raw():
    for shape, names in TIMED.items():
        assert shape in SHAPES
        assert set(names) <= set(CONTENDERS)
        assert "raw" in names


@pytest.mark.parametrize(
    ("bar", "held"),
    [
        (Bar("slower", 1.41, 1.40), False),
        (Bar("as fast", 1.40, 1.40), True),
        (Bar("faster", 2.5, 2.5, at_most=False), True),
        (Bar("not fast enough", 2.49, 2.5, at_most=False), False),
        (Bar("a figure", 170.0), None),
    ],
)
def test_bar_is_held_or_missed_by_its_figure(bar, held):
    assert bar.held is held


def test_json_names_the_machine_and_every_bar(tmp_path):
    target = tmp_path / "new folder" / "figures.json"
    write_json(target, {"mlp": {"rows": 3}}, [Bar("a ratio", 1.2, 1.4)])
    found = json.loads(target.read_text())
    assert found["mlp"] == {"rows": 3}
    assert found["bars"] == [{"what": "a ratio", "value": 1.2, "bar": 1.4, "at_most": True, "held": True}]
    assert "torch" in found["machine"]["packages"]
