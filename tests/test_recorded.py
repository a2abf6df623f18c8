"""Recorded steps: batches filled up to a few sizes, and gradients in memory that stays where it is.

CUDA graphs need a GPU; here the same way is taken without recording. `benchmarks/README.md` has the run on an H100.
"""

import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.data import Dataset
from transformers import TrainingArguments

import utils
from finetune import lora, planner, train
from finetune.experts import GroupedExperts
from finetune.machine import Machine
from finetune.model import load_model
from finetune.packing import PackedRows
from finetune.recorded import RecordedSteps, filled

sys.path.insert(0, str(ROOT / "benchmarks"))
import benchmark

ROWS = benchmark.rows(12, planner.AIR, seed=3)
for row in ROWS:
    row["input_ids"] = [token % 8192 for token in row["input_ids"]]
    row["labels"] = [label if label == -100 else label % 8192 for label in row["labels"]]


@pytest.fixture(scope="module")
def model():
    found = lora.attach(load_model(utils.BUNDLED), lora.lora_config(8))
    with torch.no_grad():  # with B at zero, A has no gradient
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    return found.train()


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def test_a_filled_batch_has_few_sizes():
    sizes = set()
    for start in range(0, 12, 4):
        batch = PackedRows()(ROWS[start : start + 4])
        full = filled(batch)
        assert full["input_ids"].shape[1] % 128 == 0 and full["input_ids"].shape[1] > batch["input_ids"].shape[1]
        assert full["cu_seq_lens_q"].tolist() == [*batch["cu_seq_lens_q"].tolist(), full["input_ids"].shape[1]]
        assert full["max_length_q"] % 128 == 0 and full["max_length_q"] >= batch["max_length_q"]
        kept = batch["logits_to_keep"].shape[0]
        assert full["logits_to_keep"].shape[0] % 128 == 0 and set(full["shift_labels"][kept:].tolist()) <= {-100}
        sizes.add(full["cu_seq_lens_q"].shape[0])
    assert sizes == {6}  # four samples and the one that fills up, whatever their lengths


def test_loss_and_gradients_are_those_of_the_batch(model):
    steps = RecordedSteps(model)
    for start in (0, 6):
        batch = PackedRows()(ROWS[start : start + 6])
        items = batch["shift_labels"].numel()
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=torch.tensor(items)).loss
        loss.backward()
        expected = gradients(model)
        for _ in range(3):  # seen for the first time, recorded, replayed
            model.zero_grad()
            assert steps(batch, items).item() == pytest.approx(loss.item(), rel=1e-5)
            for one, other in zip(gradients(model), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert len(steps.graphs) >= 1


def test_gradients_add_up_until_the_optimizer_drops_them(model):
    steps = RecordedSteps(model)
    batch = PackedRows()(ROWS[:4])
    model.zero_grad()
    steps(batch, 100)
    once = gradients(model)
    steps(batch, 100)
    for one, two in zip(once, gradients(model), strict=True):
        torch.testing.assert_close(2 * one, two, rtol=1e-3, atol=1e-6)
    addresses = [parameter.grad.data_ptr() for parameter in steps.parameters]
    model.zero_grad()  # sets them to None
    steps(batch, 100)
    assert [parameter.grad.data_ptr() for parameter in steps.parameters] == addresses
    for one, two in zip(once, gradients(model), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_no_more_sizes_are_recorded_than_allowed(model):
    steps = RecordedSteps(model, most=1)
    for count in (1, 2, 1, 2, 1, 2):
        model.zero_grad()
        steps(PackedRows()(ROWS[:count]), 50)
    assert len(steps.graphs) == 1


class Rows(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, number):
        return ROWS[number]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_learns_the_same(tmp_path, accumulation):
    histories = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = lora.attach(load_model(utils.BUNDLED), lora.lora_config(4))
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_steps=4,
            logging_steps=1, learning_rate=1e-3, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = train.ShardedTrainer(model=model, args=arguments, train_dataset=Rows(), data_collator=PackedRows())
        if recorded:
            trainer.record_steps()
        trainer.train()
        histories.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
    assert histories[0][-1] != histories[0][0]


def test_layers_that_keep_their_activations_change_nothing_but_what_is_computed_again(model, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False},
    )  # fmt: skip
    trainer = train.ShardedTrainer(model=model, args=arguments, train_dataset=Rows(), data_collator=PackedRows())
    trainer.current_gradient_accumulation_steps = 1
    batch, calls, found = PackedRows()(ROWS[:4]), [], []
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    hooks = [layer.mlp.register_forward_pre_hook(lambda *given: calls.append(given[0])) for layer in trainer.layers]
    for kept in (0, 3, len(trainer.layers), 1, 0):
        model.zero_grad()
        calls.clear()
        trainer.kept_layers = lambda tokens, kept=kept: kept
        trainer.training_step(model, dict(batch))
        found.append(gradients(model))
        again = [number for number, layer in enumerate(trainer.layers) if calls.count(layer.mlp) == 2]
        assert again == list(range(len(trainer.layers) - kept))  # the last layers keep theirs
        experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
        assert sum(module.keep_unpacked for module in experts) == len(
            [number for number in again if number]
        )  # the first layer has no experts
    for hook in hooks:
        hook.remove()
    model.activation_checkpointing_disable()
    for others in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize(
    ("gpus", "processes", "four", "fine"),
    [
        (1, 1, False, True),
        (2, 1, True, True),
        (0, 1, False, False),
        (2, 1, False, False),
        (2, 2, True, False),
    ],
)
def test_where_the_model_is_not_whole_on_one_gpu_it_is_refused(gpus, processes, four, fine):
    machine = Machine(gpus, 79.2 if gpus else 0.0, "H100" if gpus else "", 128, 1000)
    recipe = planner.Recipe(recorded=True, load_in_4bit=four)
    made = planner.plan(recipe=recipe, machine=machine, processes=processes, advise=False)
    if fine:
        train.require_one_gpu(made)
    else:
        with pytest.raises(utils.CourseError, match="--recorded-steps"):
            train.require_one_gpu(made)


def test_the_plan_counts_the_graphs_and_no_launches():
    how = {"machine": Machine(1, 79.2, "H100", 128, 1000), "advise": False}
    plain, recorded = (
        planner.plan(recipe=planner.Recipe(load_in_4bit=True, recorded=one), **how) for one in (False, True)
    )
    gradients = 4 * sum(plain.trained.values()) / 2**30
    # What a plain pass puts into the place of gradients that are not there yet.
    assert 0 < recorded.gpu["recorded steps"] <= gradients
    assert plain.gpu["recorded steps"] == 0
    assert recorded.step_seconds < 0.85 * plain.step_seconds
