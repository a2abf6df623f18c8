"""Tokens that all samples of a batch begin with, computed once: the same loss and gradients as with every sample whole.

The reference is the engine's packed batch without sharing, which `test_engine.py` holds to the textbook.
"""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset

import utils
from finetune import lora
from finetune.model import load_model
from finetune.packing import Gathered, PackedRows, pad_to, shared_prefix
from finetune.recorded import RecordedSteps, filled

SYSTEM = list(range(100, 119))


def sample(prompt, answer, seed):
    ids = torch.randint(200, 8000, (prompt + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": SYSTEM + ids, "labels": [-100] * (len(SYSTEM) + prompt) + ids[prompt:]}


ROWS = [sample(*sizes, seed) for seed, sizes in enumerate([(5, 7), (12, 3), (2, 20), (9, 1), (30, 11)])]


pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture(scope="module")
def model():
    found = lora.attach(load_model(utils.BUNDLED), lora.lora_config(8))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # with B at zero, A has no gradient
        for name, parameter in sorted(found.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=draw)
    return found.train()


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[::-1]], ids=["five", "one", "other order"])
def test_loss_and_gradients_are_those_of_whole_samples(model, rows):
    shared = PackedRows(len(SYSTEM))(deepcopy(rows))
    whole = PackedRows()(deepcopy(rows))
    saved = len(SYSTEM) * (len(rows) - 1)
    assert shared["input_ids"].shape[1] == whole["input_ids"].shape[1] - saved
    assert sorted(shared["shift_labels"].tolist()) == sorted(whole["shift_labels"].tolist())
    assert_same(loss_and_gradients(model, shared), loss_and_gradients(model, whole))


def test_a_sample_reads_the_shared_tokens_and_its_own_and_no_others(model):
    batch = dict(PackedRows(len(SYSTEM))(deepcopy(ROWS[:3])))
    for name in ("labels", "logits_to_keep", "shift_labels"):
        del batch[name]
    with torch.no_grad():
        before = model(**batch).logits[0]
        start, end = batch["cu_seq_lens_q"].tolist()[2:4]
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][0, start] += 1
        after = model(**batch).logits[0]
        batch["input_ids"][0, len(SYSTEM) - 1] += 1
        all_changed = model(**batch).logits[0]
    differs = [(a - b).norm() / b.norm() > 1e-4 for a, b in zip(after, before, strict=True)]
    assert all(differs[start:end]) and not any(differs[:start] + differs[end:])
    assert all((a - b).norm() / b.norm() > 1e-4 for a, b in zip(all_changed[start:], after[start:], strict=True))


def test_filled_up_and_replayed_it_is_the_same(model):
    batch = PackedRows(len(SYSTEM))(deepcopy(ROWS))
    expected = loss_and_gradients(model, dict(batch))
    length = batch["input_ids"].shape[1]
    assert_same(loss_and_gradients(model, pad_to(dict(batch), length + 7)), expected)
    steps = RecordedSteps(model)
    for _ in range(3):  # seen for the first time, recorded, replayed
        model.zero_grad()
        loss = steps(dict(batch), batch["shift_labels"].numel()).item()
        assert_same((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}), expected)


def test_batches_of_one_size_have_as_many_keys():
    """Otherwise a recorded step would read another batch's places."""
    sizes = set()
    for rows in (ROWS[:3], ROWS[2:]):
        full = filled(PackedRows(len(SYSTEM))(deepcopy(rows)))
        assert full["key_places"].shape[0] == full["cu_seq_lens_k"][-1]
        sizes.add((full["input_ids"].shape[1], full["key_places"].shape[0]))
    assert len(sizes) == 1


def test_what_all_rows_begin_with_is_found():
    assert shared_prefix(Dataset.from_list(ROWS)) == len(SYSTEM)
    other = sample(4, 4, 9)
    other["input_ids"][7] = 5
    assert shared_prefix(Dataset.from_list([*ROWS, other])) == 7
    short = {"input_ids": [*SYSTEM[:3], 7, 8], "labels": [-100] * 3 + [7, 8]}
    assert shared_prefix(Dataset.from_list([*ROWS, short])) == 2  # the third token predicts a label
    assert shared_prefix(Dataset.from_list([short, {"input_ids": SYSTEM[:2], "labels": [-100, 101]}])) == 0
    unlabelled = {"input_ids": SYSTEM, "labels": [-100] * len(SYSTEM)}
    assert shared_prefix(Dataset.from_list([unlabelled, unlabelled])) == len(SYSTEM) - 1  # each keeps a token


def test_a_batch_with_another_beginning_is_packed_whole():
    other = sample(4, 4, 9)
    other["input_ids"][7] = 5
    found, whole = (PackedRows(shared)(deepcopy([*ROWS, other])) for shared in (len(SYSTEM), 0))
    assert "key_places" not in found and torch.equal(found["input_ids"], whole["input_ids"])


def test_gradients_of_shared_tokens_add_up_in_float32():
    x = torch.ones(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    places = torch.tensor([0] * 1000 + [1])
    Gathered.apply(x, places).sum().backward()
    assert x.grad.flatten().tolist() == [1000.0, 1.0]  # adding in bfloat16 stops at 256
