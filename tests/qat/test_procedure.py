"""A procedure trains with the quantizers of any method: what goes through it, what it lowers, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.qat.recording import BATCHES, network
from tests.qat.training import RECIPE, assert_same, data, killed, network as conv_network, train

import lowbit
from lowbit.errors import SpecError, UnknownNameError
from lowbit.methods.gradients.ewgs import Ewgs
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.methods.training.qkd import Qkd, QkdQuantizers
from lowbit.network.bits import get_bits, lower_bits
from lowbit.network.record import record_of
from lowbit.qat import Classification, OptimizerSpec, Phase, Procedure, Recipe, TrainRun
from lowbit.qat.recipe import Role
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.registry import find_method
from lowbit.spec import BitPolicy, LayerBits

STAGES = (LayerBits(None, 8), LayerBits(8, 8), LayerBits(4, 5))


@dataclass
class OwnQuantizers(Lsq):
    """Those of the paper."""


@dataclass
class Lowering(Procedure):
    """Bits come down in stages, the weights' after the inputs'."""

    quantizers = OwnQuantizers
    info = replace(Qkd.info, name="lowering")

    def stages(self) -> Sequence[LayerBits]:
        return STAGES

    def phases(self, recipe: Recipe) -> list[Phase]:
        return self.split(recipe, {f"stage {index}": 1 for index in range(len(STAGES) + 1)})

    def start_phase(self, run: TrainRun) -> None:
        super().start_phase(run)
        lower_bits(run.model, [*STAGES, LayerBits(1, 1)][int(run.phase.name[-1])])


def prepared(**asked: Any) -> torch.nn.Module:
    policy = BitPolicy.uniform(2, 3, first_last=None)
    return lowbit.prepare(network(), policy=policy, sample=BATCHES[0][0], **asked)


def trained(epochs: int, **asked: Any) -> tuple[torch.nn.Module, list[str]]:
    """A network trained by hand, and the phase of each epoch."""
    model = prepared(**asked).train()
    recipe = Recipe(epochs, optimizer=OptimizerSpec(learning_rate=0.05))
    given = lowbit.qat.GivenNetworks(float_network=network())  # type: ignore[attr-defined]
    run, seen = TrainRun(model, model.lowbit_method, Classification(), recipe, len(BATCHES), given=given), []  # type: ignore[arg-type]
    for _ in run.each_epoch():
        seen.append(run.phase.name)
        for batch in BATCHES:
            run.before_step()
            run.loss(batch).backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
    return model, seen


def test_the_quantizers_are_the_methods_and_the_phases_the_procedures() -> None:
    model, phases = trained(6, method="lsq", procedure="qkd", scale_gradient=False)
    assert phases == ["self-studying"] * 2 + ["co-studying"] * 2 + ["tutoring"] * 2
    assert {type(module) for module in model.modules() if isinstance(module, lowbit.Quantizer)} == {LearnedScaleQuantizer}
    assert not any(module.scales_gradient for module in model.modules() if isinstance(module, LearnedScaleQuantizer))


@dataclass
class Slower(Procedure):
    """Rates of its own for biases and norms, in the phases of the base or in its own."""

    quantizers = OwnQuantizers
    info = replace(Qkd.info, name="slower")
    parts: int = 1

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        found = super().optimizers(recipe)
        return {**found, "others": replace(found["others"], learning_rate=0.125)}

    def phases(self, recipe: Recipe) -> list[Phase]:
        return super().phases(recipe) if self.parts == 1 else self.split(recipe, dict.fromkeys("ab", 1))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_procedures_optimizers_count_in_every_phase(parts: int) -> None:
    phases = Slower(base=Lsq(quantizer_learning_rate=0.5), parts=parts).phases(Recipe(4, optimizer=OptimizerSpec(learning_rate=0.1)))
    rates = [{role: spec.learning_rate for role, spec in phase.optimizers.items()} for phase in phases]
    assert rates == [{"weights": 0.1, "others": 0.125, "quantizers": 0.05}] * parts
    with pytest.raises(SpecError, match=r"'bi_real_net' has the phases leaky clip, clip.* cannot go through those of 'slower'"):
        prepared(method="bi_real_net", procedure=Slower, pretraining=0.5)


def test_what_was_done_is_recorded_with_the_methods_options_and_the_procedures() -> None:
    record = record_of(prepared(method="ewgs", procedure="qkd", delta=0.5, procedure_options={"temperature": "3", "co_share": 0.5}))
    assert record is not None and record.method == "ewgs"
    assert {name: record.options[name] for name in ("delta", "procedure", "procedure.temperature", "procedure.co_share")} == {
        "delta": 0.5, "procedure": "qkd", "procedure.temperature": 3.0, "procedure.co_share": 0.5,
    }  # fmt: skip
    own = record_of(prepared(method="qkd", temperature=3, interval="clip"))
    assert own is not None and own.method == "qkd" and "procedure" not in own.options
    assert (own.options["temperature"], own.options["interval"]) == (3.0, "clip")


def test_a_procedure_is_a_name_a_class_or_an_object() -> None:
    models = [prepared(method="lsq", procedure=procedure) for procedure in ("qkd", Qkd, Qkd(), Qkd(base=Ewgs()))]
    for model in models:
        assert isinstance(model.lowbit_method, Qkd) and isinstance(model.lowbit_method.base, Lsq)
    facts = find_method(models[0].lowbit_method)
    assert (facts.name, facts.method, facts.weight_bits) == ("lsq", Qkd, range(1, 9))
    assert "teacher" in facts.needs and facts.axes == ("weight_quantizer", "activation_quantizer", "procedure")
    assert Qkd.info.name == "qkd" and Lsq.info.axes == ("weight_quantizer", "activation_quantizer")


def test_the_quantizers_of_a_paper_with_a_procedure_go_through_another_one() -> None:
    model, phases = trained(8, method="qkd", procedure=Lowering)
    assert phases == [f"stage {index}" for index in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert isinstance(model.lowbit_method, Lowering) and isinstance(model.lowbit_method.base, QkdQuantizers)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"method": "proxquant", "procedure": "qkd"}, SpecError, "the quantizers of 'proxquant' need its own phases"),
        ({"method": "lsq", "procedure": "ewgs"}, SpecError, "'ewgs' is no procedure .* Those are: .*qkd"),
        ({"method": "lsq", "procedure": "qdk"}, UnknownNameError, "Did you mean 'qkd'"),
        ({"method": "lsq", "procedure": "qkd", "procedure_options": {"interval": "clip"}}, SpecError, "interval belongs to the quantizers of qkd"),
        ({"method": "lsq", "procedure": "qkd", "procedure_options": {"tau": 1}}, UnknownNameError, "unknown option of the procedure qkd 'tau'"),
        ({"method": "lsq", "procedure": "qkd", "procedure_options": {"temperature": 0}}, SpecError, "temperature must be above 0"),
        ({"method": "lsq", "procedure": Qkd(), "procedure_options": {"temperature": 1}}, SpecError, "set temperature there"),
        ({"method": "lsq", "procedure_options": {"temperature": 1}}, SpecError, "temperature without a procedure"),
        ({"method": "binary_connect", "procedure": "qkd", "squared_hinge": True}, SpecError, "trains on a loss of its own"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_why(asked: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepared(**asked)


def test_a_method_with_phases_of_its_own_is_refused_where_the_procedure_has_some() -> None:
    for method, options, phases in (
        ("qil", {"progressive": (4,)}, "4 bits, train"),
        ("bi_real_net", {"pretraining": 0.5}, "leaky clip, clip"),
    ):
        with pytest.raises(SpecError, match=f"'{method}' has the phases {phases}.* cannot go through those of 'qkd'"):
            prepared(method=method, procedure="qkd", **options)


@pytest.mark.parametrize("method", ["lsq", "qil", "pact", "lq_nets"])
def test_bits_come_down_by_stages_and_end_where_they_were_asked_for(method: str) -> None:
    model = prepared(method=method, procedure=Lowering)
    assert set(get_bits(model).values()) == {LayerBits(2, 3)}
    run = TrainRun(model.train(), model.lowbit_method, Classification(), Recipe(4), len(BATCHES))  # type: ignore[arg-type]
    seen = []
    for _ in run.each_epoch():
        seen += set(get_bits(model).values())
        assert torch.isfinite(run.model(BATCHES[0][0])).all()
    assert seen == [LayerBits(None, 8), LayerBits(8, 8), LayerBits(4, 5), LayerBits(2, 3)]


def test_a_grid_of_fewer_bits_is_derived_from_what_was_learned_at_more() -> None:
    model = prepared(method="lsq", procedure=Lowering)
    lower_bits(model, LayerBits(8, 8))
    quantizers = [q for q in model.modules() if isinstance(q, LearnedScaleQuantizer)]
    with torch.no_grad():
        for quantizer in quantizers:
            quantizer.scale.mul_(3)
    learned = [(q.scale * q.qmax).detach().clone() for q in quantizers]
    lower_bits(model, LayerBits(4, 4))
    for quantizer, reach in zip(quantizers, learned, strict=True):
        torch.testing.assert_close(quantizer.scale * quantizer.qmax, reach)


def test_quantizers_start_at_the_first_stage() -> None:
    model = prepared(method="lsq", procedure=Lowering)
    at_eight = lowbit.prepare(network(), method="lsq", policy=BitPolicy.uniform(8, 8, first_last=None), sample=BATCHES[0][0])
    lower_bits(model, LayerBits(8, 8))
    for name, parameter in at_eight.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_method_without_the_widths_of_all_stages_is_refused() -> None:
    with pytest.raises(SpecError, match="lowers weight bits over 8, 4, 1, and RecuWeight has 1 alone"):
        lowbit.prepare(network(), method="recu", weight_bits=1, activation_bits=1, sample=BATCHES[0][0], procedure=Lowering)
    with pytest.raises(SpecError, match="lowers weight bits over 8, 4, 2, and TernaryQuantizer has 2 alone"):
        lowbit.prepare(network(), method="twn", weight_bits=2, activation_bits=None, sample=BATCHES[0][0], procedure=Lowering)


@pytest.mark.parametrize("method", ["lsq", "ewgs", "pact"])
def test_kills_in_every_phase_change_no_bit_of_network_or_companion(method: str, tmp_path: Path) -> None:
    from lowbit.files import read_tensors

    asked = {"method": method, "procedure": "qkd", "recipe": RECIPE, "save_every": "1", "procedure_options": {"self_share": 1 / 3}}
    asked |= {"teacher": conv_network()}
    whole = train(out=tmp_path / "whole", **asked)
    for step in (4, 8, 13):
        killed(step, tmp_path / "killed", **asked)
    assert_same(train(out=tmp_path / "killed", **asked), whole)
    one, other = (read_tensors(tmp_path / name / ".work" / "last.safetensors")[0] for name in ("whole", "killed"))
    teacher = [name for name in one if name.startswith("networks.teacher.")]
    assert len(teacher) == len(list(conv_network().parameters())) + len(list(conv_network().buffers()))
    assert all(torch.equal(one[name], other[name]) for name in teacher)
    assert any(not torch.equal(one[f"networks.teacher.{name}"], p) for name, p in conv_network().named_parameters())


def test_kills_while_bits_come_down_change_no_bit(tmp_path: Path) -> None:
    asked = {"method": "lsq", "procedure": Lowering, "weight_bits": 2, "recipe": replace(RECIPE, epochs=4), "save_every": "1"}
    whole = train(**asked)
    for step in (3, 9, 14):
        killed(step, tmp_path, **asked)
    assert_same(train(out=tmp_path, **asked), whole)


def test_another_procedure_or_option_is_another_run(tmp_path: Path) -> None:
    killed(4, tmp_path, method="lsq", procedure="qkd", save_every="1")
    for other in ({"procedure_options": {"temperature": 3}}, {"procedure": None}):
        with pytest.raises(SpecError, match="procedure"):
            train(out=tmp_path, **{"method": "lsq", "procedure": "qkd", **other})


def test_a_loop_of_ones_own_gives_the_weights_of_the_trainer() -> None:
    x, y = data().tensors
    recipe = Recipe(epochs=3, batch_size=80, optimizer=OptimizerSpec(learning_rate=0.05, momentum=0.9, schedule="constant"))
    whole = train(data=(x, y), method="lsq", procedure="qkd", recipe=recipe, augment="none", sample=x[:16])
    model = lowbit.prepare(conv_network(), method="lsq", procedure="qkd", weight_bits=3, activation_bits=3, sample=x[:16]).train()
    run = lowbit.training(model, steps_per_epoch=1, epochs=3, recipe=recipe, float_network=conv_network())
    optimizer = torch.optim.SGD(run.parameter_groups(), momentum=0.9)
    for _ in range(3):
        run.before_step(optimizer)
        for loss in run.losses((x, y)):
            loss.backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name, rtol=1e-4, atol=1e-5)


def test_without_the_float_network_a_loop_says_what_to_give() -> None:
    with pytest.raises(SpecError, match="pass float_network="):
        lowbit.training(prepared(method="lsq", procedure="qkd"), steps_per_epoch=1, epochs=3)
