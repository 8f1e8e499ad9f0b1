"""Heads compute what quaterion-models' heads of the same names compute, and come back from JSON and weights alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quatcache.errors import ConfigError, ModelDefinitionError, QuatcacheError
from quatcache.heads import (
    ACTIVATIONS,
    HEADS,
    EmptyHead,
    EncoderHead,
    GatedHead,
    LinearHead,
    SequentialHead,
    SkipConnectionHead,
    StackedProjectionHead,
    WideningHead,
    head_from_config,
    head_to_config,
    register_head,
)

WIDTH = 6


def everything_in_a_row() -> SequentialHead:
    return SequentialHead(
        nn.LayerNorm(WIDTH, eps=1e-3, bias=False),
        nn.Linear(WIDTH, 8, bias=False),
        nn.Sequential(nn.GELU(approximate="tanh"), nn.LeakyReLU(0.3)),
        GatedHead(8, dropout=0.25),
        nn.Dropout(0.5),
        nn.BatchNorm1d(8, eps=1e-2, momentum=0.3),
        nn.ELU(alpha=0.7),
        nn.Mish(),
        nn.SiLU(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.Identity(),
        nn.Linear(8, 4),
        nn.ReLU(inplace=True),
        nn.Softmax(dim=1),
        output_size=4,
        dropout=0.1,
    )


MAKERS = {
    "empty": lambda: EmptyHead(WIDTH, dropout=0.2),
    "linear": lambda: LinearHead(WIDTH, 3, bias=False, dropout=0.2),
    "linear with bias": lambda: LinearHead(WIDTH, 3),
    "gated": lambda: GatedHead(WIDTH),
    "skip_connection": lambda: SkipConnectionHead(WIDTH, dropout=0.1, skip_dropout=0.3),
    "stacked_projection": lambda: StackedProjectionHead(WIDTH, [9, 5, 2], activation_fn="tanh", dropout=0.1),
    "stacked_projection without bias": lambda: StackedProjectionHead(WIDTH, (4,), bias=False),
    "widening": lambda: WideningHead(WIDTH, 2.5, activation_fn="gelu", dropout=0.1, bias=False),
    "sequential": everything_in_a_row,
}
OUTPUT_SIZES = {"linear": 3, "linear with bias": 3, "stacked_projection": 2, "stacked_projection without bias": 4}
OUTPUT_SIZES["sequential"] = 4

every_head = pytest.mark.parametrize("name", MAKERS)


def trained(head: EncoderHead) -> EncoderHead:
    """Move every weight and buffer away from its initial value, so that fresh weights cannot pass for loaded ones."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return head


def inputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)


@every_head
def test_output_has_the_declared_width(name: str) -> None:
    head = MAKERS[name]()
    assert head.output_size == OUTPUT_SIZES.get(name, WIDTH)
    assert head.input_embedding_size == WIDTH
    for rows in (2, 7):
        assert head(inputs(rows)).shape == (rows, head.output_size)


@every_head
def test_gradients_are_those_of_the_function(name: str) -> None:
    head = trained(MAKERS[name]()).double().eval()
    parameters = list(head.parameters())
    x = inputs(3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: head(x), (x, *parameters), atol=1e-6)


@every_head
def test_every_parameter_is_trained(name: str) -> None:
    head = trained(MAKERS[name]()).eval()
    x = inputs().requires_grad_()
    head(x).pow(2).sum().backward()
    assert x.grad.abs().sum() > 0
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@every_head
def test_head_comes_back_from_json_and_weights(name: str, tmp_path) -> None:
    head = trained(MAKERS[name]()).eval()
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    text = json.dumps(head_to_config(head), allow_nan=False)

    again = head_from_config(json.loads(text)).eval()
    again.load_state_dict(load_file(tmp_path / "head.safetensors"), strict=True)

    assert type(again) is type(head)
    assert head_to_config(again) == json.loads(text)
    assert str(again) == str(head)
    assert torch.equal(again(inputs()), head(inputs()))


@every_head
def test_training_mode_comes_back_with_the_same_dropout(name: str) -> None:
    head = trained(MAKERS[name]())
    again = head_from_config(head_to_config(head))
    again.load_state_dict(head.state_dict())
    torch.manual_seed(3)
    expected = head(inputs())
    torch.manual_seed(3)
    assert torch.equal(again(inputs()), expected)


@every_head
def test_other_width_is_refused_with_both_widths(name: str) -> None:
    with pytest.raises(ConfigError, match=f"rows of {WIDTH + 1} values but was made for {WIDTH}"):
        MAKERS[name]()(torch.zeros(2, WIDTH + 1))


def test_gates_do_not_broadcast_over_rows_of_one_value() -> None:
    with pytest.raises(ConfigError, match="rows of 1 values"):
        GatedHead(WIDTH)(torch.zeros(2, 1))


def test_empty_head_returns_its_input_unless_it_drops_out() -> None:
    x = inputs()
    assert EmptyHead(WIDTH)(x) is x
    dropped = EmptyHead(WIDTH, dropout=0.5)(torch.ones(200, WIDTH))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(EmptyHead(WIDTH, dropout=0.5).eval()(x), x)


def test_gated_head_scales_by_tanh_and_starts_open() -> None:
    head = GatedHead(WIDTH)
    assert torch.equal(head.gates, torch.full((WIDTH,), 2.0))
    with torch.no_grad():
        head.gates.copy_(torch.linspace(-3, 3, WIDTH))
    torch.testing.assert_close(head(inputs()), inputs() * torch.tanh(torch.linspace(-3, 3, WIDTH)))


def test_skip_connection_head_adds_a_gated_branch_and_starts_closed() -> None:
    head = SkipConnectionHead(WIDTH)
    assert torch.equal(head.gates, torch.full((WIDTH,), -4.0))
    x = inputs()
    branch = x @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(head(x), x + branch / (1 + torch.exp(torch.tensor(4.0))))


def test_skip_dropout_leaves_the_embedding_itself_intact() -> None:
    head = SkipConnectionHead(WIDTH, skip_dropout=0.9)
    with torch.no_grad():
        head.fc.weight.copy_(torch.eye(WIDTH))
        head.fc.bias.zero_()
        head.gates.fill_(100.0)  # a gate of 1
    torch.manual_seed(0)
    output = head(torch.ones(500, WIDTH))
    # Dropped: the embedding alone. Kept: the embedding plus its tenfold copy.
    torch.testing.assert_close(output.unique(), torch.tensor([1.0, 11.0]))


def test_dropout_comes_before_the_transformation() -> None:
    head = LinearHead(1, 1, dropout=0.5)
    with torch.no_grad():
        head.linear.weight.fill_(3.0)
        head.linear.bias.fill_(1.0)
    torch.manual_seed(0)
    assert set(head(torch.ones(100, 1)).flatten().tolist()) == {1.0, 7.0}


def test_head_without_dropout_draws_no_random_number() -> None:
    heads = [SkipConnectionHead(WIDTH), WideningHead(WIDTH), GatedHead(WIDTH)]
    before = torch.get_rng_state()
    for head in heads:
        head(inputs())
    assert torch.equal(torch.get_rng_state(), before)


def test_reset_parameters_restores_the_initial_gates() -> None:
    for head, gate in ((GatedHead(WIDTH), 2.0), (SkipConnectionHead(WIDTH), -4.0)):
        trained(head)
        head.reset_parameters()
        assert torch.equal(head.gates, torch.full((WIDTH,), gate))


def test_stacked_projection_activates_between_layers_and_not_after_the_last() -> None:
    head = StackedProjectionHead(WIDTH, [4, 3], activation_fn="relu")
    first, last = head.layers
    expected = torch.relu(inputs() @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(head(inputs()), expected)
    assert (head(inputs(50)) < 0).any()


def test_single_projection_is_linear() -> None:
    head = StackedProjectionHead(WIDTH, [3], bias=False)
    torch.testing.assert_close(head(inputs()), inputs() @ head.layers[0].weight.T)


def test_widening_head_widens_by_the_factor_and_narrows_again() -> None:
    head = WideningHead(WIDTH, expansion_factor=1.5, activation_fn="sigmoid", bias=False)
    wide, narrow = head.layers
    assert wide.weight.shape == (9, WIDTH)
    torch.testing.assert_close(head(inputs()), torch.sigmoid(inputs() @ wide.weight.T) @ narrow.weight.T)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_the_torch_function_of_its_name(name: str) -> None:
    head = StackedProjectionHead(WIDTH, [WIDTH, WIDTH], activation_fn=name, bias=False)
    with torch.no_grad():
        for layer in head.layers:
            layer.weight.copy_(torch.eye(WIDTH))
    torch.testing.assert_close(head(inputs()), getattr(nn.functional, name)(inputs()))


def test_sequential_head_runs_its_layers_in_order_and_shows_them() -> None:
    layers = [nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 2)]
    head = SequentialHead(*layers, output_size=2)
    torch.testing.assert_close(head(inputs()), nn.Sequential(*layers)(inputs()))
    assert len(head) == 3 and list(head) == layers and head[-1] is layers[2]


def test_sequential_head_reads_its_input_width_off_the_layers() -> None:
    class Custom(nn.Module):
        pass

    assert SequentialHead(nn.ReLU(), nn.Linear(4, 2), output_size=2).input_embedding_size == 4
    assert SequentialHead(nn.Sequential(nn.Tanh(), nn.Linear(5, 2)), output_size=2).input_embedding_size == 5
    assert SequentialHead(nn.BatchNorm1d(7), Custom(), output_size=2).input_embedding_size == 7
    assert SequentialHead(nn.LayerNorm(7), Custom(), output_size=2).input_embedding_size == 7
    assert SequentialHead(nn.Sequential(), nn.ReLU(), output_size=3).input_embedding_size == 3
    assert SequentialHead(GatedHead(9), output_size=9).input_embedding_size == 9
    assert SequentialHead(Custom(), output_size=9, input_embedding_size=5).input_embedding_size == 5
    with pytest.raises(ConfigError, match=r"does not show in .*Custom; pass input_embedding_size"):
        SequentialHead(Custom(), nn.Linear(4, 2), output_size=2)


def test_sequential_head_refuses_a_wrong_declared_width() -> None:
    head = SequentialHead(nn.Linear(WIDTH, 4), output_size=5)
    with pytest.raises(ConfigError, match="output_size=5 but its layers give 4"):
        head(inputs())


def test_sequential_head_refuses_a_class_in_place_of_an_instance() -> None:
    with pytest.raises(ModelDefinitionError, match=r"layer 1 of SequentialHead is <class .*ReLU.*instances"):
        SequentialHead(nn.Linear(2, 2), nn.ReLU, output_size=2)
    with pytest.raises(ConfigError, match="0 layers"):
        SequentialHead(output_size=2)


@pytest.mark.parametrize("bad", [0, -3, 2.0, "8", None, True])
def test_unusable_widths_are_refused_with_the_value(bad: object) -> None:
    for make in (
        lambda: EmptyHead(bad),
        lambda: LinearHead(4, bad),
        lambda: StackedProjectionHead(4, [8, bad]),
        lambda: WideningHead(bad),
        lambda: SequentialHead(nn.ReLU(), output_size=bad),
    ):
        with pytest.raises(ConfigError, match="whole number, at least 1") as caught:
            make()
        assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan"), "0.1", None, True])
def test_unusable_dropout_is_refused_with_the_value(bad: object) -> None:
    for make, name in (
        (lambda: GatedHead(4, dropout=bad), "dropout"),
        (lambda: SkipConnectionHead(4, skip_dropout=bad), "skip_dropout"),
    ):
        with pytest.raises(ConfigError, match=f"^{name} is ") as caught:
            make()
        assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [0.1, 0, float("nan"), float("inf"), "2", True])
def test_unusable_expansion_is_refused_with_the_value(bad: object) -> None:
    with pytest.raises(ConfigError, match="expansion_factor") as caught:
        WideningHead(1, bad) if bad is True else WideningHead(4, bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [[], (), "12", 12, None])
def test_unusable_output_sizes_are_refused(bad: object) -> None:
    with pytest.raises(ConfigError, match="output_sizes is"):
        StackedProjectionHead(4, bad)


def test_numpy_widths_are_accepted_and_become_json() -> None:
    import numpy as np

    head = LinearHead(np.int64(4), np.int32(2))
    assert json.loads(json.dumps(head_to_config(head)))["config"]["output_size"] == 2


@pytest.mark.parametrize("name", ["threshold_", "no_such", "__class__", 3, ["relu"]])
def test_activation_outside_the_list_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match=r"activation_fn is .*choose one of elu, gelu"):
        WideningHead(4, activation_fn=name)


def test_subclass_without_its_methods_names_what_is_missing() -> None:
    class Unfinished(EncoderHead):
        pass

    with pytest.raises(ModelDefinitionError, match=r"Unfinished has no transform"):
        Unfinished(2)(torch.zeros(1, 2))
    with pytest.raises(ModelDefinitionError, match=r"Unfinished has no output_size"):
        _ = Unfinished(2).output_size


class ShiftHead(EncoderHead):
    def __init__(self, input_embedding_size: int, shift: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__(input_embedding_size, dropout)
        self.shift = shift

    @property
    def output_size(self) -> int:
        return self.input_embedding_size

    def transform(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.shift

    def config(self) -> dict[str, object]:
        return {**super().config(), "shift": self.shift}


@pytest.fixture
def registry():
    before = dict(HEADS)
    yield HEADS
    HEADS.clear()
    HEADS.update(before)


def test_registered_head_of_a_user_is_rebuilt_also_inside_a_sequence(registry) -> None:
    assert register_head("shift")(ShiftHead) is ShiftHead
    head = SequentialHead(ShiftHead(2, shift=0.5), nn.ReLU(), output_size=2)
    again = head_from_config(json.loads(json.dumps(head_to_config(head))))
    assert torch.equal(again(torch.zeros(1, 2)), torch.full((1, 2), 0.5))


def test_kind_of_another_class_is_not_taken_over(registry) -> None:
    with pytest.raises(ConfigError, match=r"'linear' already belongs to LinearHead"):
        register_head("linear")(ShiftHead)
    assert HEADS["linear"] is LinearHead


def test_class_defined_anew_replaces_itself(registry) -> None:
    register_head("shift")(ShiftHead)
    newer = type("ShiftHead", (ShiftHead,), {"__module__": ShiftHead.__module__, "__qualname__": "ShiftHead"})
    register_head("shift")(newer)
    assert HEADS["shift"] is newer


def test_config_that_is_not_json_is_refused_at_saving(registry) -> None:
    register_head("shift")(ShiftHead)
    for shift in (float("nan"), torch.zeros(1), {1, 2}):
        with pytest.raises(ModelDefinitionError, match=r"ShiftHead.config\(\) holds something that JSON has not"):
            head_to_config(ShiftHead(2, shift=shift))


def test_module_without_a_kind_cannot_be_saved_and_says_what_to_do() -> None:
    class Custom(nn.Module):
        pass

    class DerivedLinear(LinearHead):
        pass

    for module, name, remedy in (
        (Custom(), "Custom", "derive it from EncoderHead"),
        (ShiftHead(2), "ShiftHead", "decorate the class with register_head"),
        (DerivedLinear(2, 2), "DerivedLinear", "decorate the class with register_head"),
        (nn.Linear(2, 2), "Linear", "wrap it, as in SequentialHead"),
        (nn.Sequential(nn.ReLU()), "Sequential", "wrap it, as in SequentialHead"),
        (SequentialHead(nn.Linear(2, 2), Custom(), output_size=2), "Custom", "derive it from EncoderHead"),
    ):
        with pytest.raises(ModelDefinitionError, match=rf"{name} has no registered kind.*{remedy}"):
            head_to_config(module)


def test_subclass_of_a_torch_layer_is_not_saved_as_its_parent() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ModelDefinitionError, match="Scaled has no registered kind"):
        head_to_config(SequentialHead(Scaled(2, 2), output_size=2))


LINEAR = {"input_embedding_size": 4, "output_size": 2}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"kind": "os.system", "config": {}}, r"kind 'os.system' is unknown; known are .*linear"),
        ({"kind": "LinearHead", "config": LINEAR}, r"'LinearHead' is unknown"),
        ({"kind": "torch.linear", "config": {"in_features": 2, "out_features": 2}}, r"'torch.linear' is unknown"),
        ({"kind": "linear", "config": {**LINEAR, "device": "meta"}}, r"does not fit head kind 'linear'.*device"),
        ({"kind": "linear", "config": {"output_size": 2}}, r"does not fit head kind 'linear'.*input_embedding_size"),
        ({"kind": "linear", "config": {**LINEAR, "output_size": 0}}, "output_size is 0"),
        ({"kind": "linear", "config": {**LINEAR, "output_size": "2"}}, "output_size is '2'"),
        ({"kind": "widening", "config": {"input_embedding_size": 4, "activation_fn": "os"}}, "activation_fn is 'os'"),
        ({"kind": "sequential", "config": {"output_size": 2}}, "has layers None"),
        ({"kind": "sequential", "config": {"output_size": 2, "layers": ["relu"]}}, "described by 'relu'"),
        ({"kind": "linear"}, "expected {'kind': str, 'config': dict}"),
        ({"kind": ["linear"], "config": {}}, "expected"),
        ({"kind": "linear", "config": {1: 2}}, "expected"),
        ([], r"described by \[\]"),
        (None, "described by None"),
    ],
)
def test_description_that_cannot_be_built_is_one_clear_error(config: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        head_from_config(config)


@pytest.mark.parametrize(
    "layer",
    [
        {"kind": "torch.linear", "config": {"in_features": 2, "out_features": 2, "device": "meta"}},
        {"kind": "torch.linear", "config": {"in_features": "2", "out_features": 2}},
        {"kind": "torch.linear", "config": {"in_features": -2, "out_features": 2}},
        {"kind": "torch.dropout", "config": {"p": 7}},
        {"kind": "torch.sequential", "config": {}},
        {"kind": "torch.load", "config": {}},
        {"kind": "torch.relu"},
    ],
)
def test_layer_that_cannot_be_built_is_one_clear_error(layer: object) -> None:
    with pytest.raises(ConfigError):
        head_from_config({"kind": "sequential", "config": {"layers": [layer], "output_size": 2}})


def test_every_builtin_kind_is_covered_here() -> None:
    elsewhere = {"upper_layers"}  # takes sequences: tests/test_upper_layers.py
    assert {head_to_config(make())["kind"] for make in MAKERS.values()} | elsewhere == set(HEADS)


def test_errors_are_quatcache_errors_with_their_builtin_parent() -> None:
    with pytest.raises(QuatcacheError):
        EmptyHead(0)
    with pytest.raises(ValueError, match="unknown"):
        head_from_config({"kind": "x", "config": {}})
    with pytest.raises(TypeError, match="no registered kind"):
        head_to_config(nn.ReLU())


@pytest.mark.parametrize("module", ["quatcache.heads", "quatcache.losses", "quatcache.metrics"])
def test_importing_loads_no_training_framework(module: str) -> None:
    script = (
        f"import sys, {module}; "
        "print({name.split('.')[0] for name in sys.modules} & "
        "{'pytorch_lightning', 'lightning', 'lightning_fabric', 'sentence_transformers', 'pytorch_metric_learning'})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
