from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.train.distillation_loss import DistillationLoss, compute_distillation_metrics

NO_LABEL = -1


def draw(num_cells=5, num_classes=4, seed=0):
    """Return the student's logits, the teacher's, and class ids of which the last is missing."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(num_cells, num_classes, generator=generator) for _ in range(2))
    class_ids = torch.randint(num_classes, (num_cells,), generator=generator)
    class_ids[-1] = NO_LABEL
    return student, teacher, class_ids


def join(class_ids, teacher):
    return torch.cat([class_ids[:, None].float(), teacher], dim=1)


def softmax(values):
    powers = [np.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(("temperature", "teacher_weight"), [(1.0, 0.5), (2.0, 0.3), (7.5, 1.0), (0.5, 0.0)])
def test_loss_equals_the_formula_cell_by_cell(temperature, teacher_weight):
    student, teacher, class_ids = draw()
    losses = DistillationLoss(temperature, teacher_weight).of_cells(student, join(class_ids, teacher))
    for cell in range(len(student)):
        soft_teacher = softmax(teacher[cell].double().numpy() / temperature)
        soft_student = softmax(student[cell].double().numpy() / temperature)
        divergence = sum(p * (np.log(p) - np.log(q)) for p, q in zip(soft_teacher, soft_student, strict=True))
        expected = teacher_weight * temperature**2 * divergence
        if class_ids[cell] != NO_LABEL:
            expected += (1 - teacher_weight) * -np.log(softmax(student[cell].double().numpy())[class_ids[cell]])
        assert float(losses[cell]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_student_that_answers_as_the_teacher_has_nothing_to_learn():
    _, teacher, class_ids = draw()
    student = (teacher + 5).requires_grad_()  # the same probabilities
    loss = DistillationLoss(3.0, 1.0)({"logits": student}, join(class_ids, teacher))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_the_square_of_the_temperature_keeps_the_gradient_from_vanishing():
    # Hinton et al. 2015, section 2.1: with a high temperature the gradient becomes that of squared logit differences.
    student, teacher, class_ids = (value.double() for value in draw())
    student.requires_grad_()
    DistillationLoss(1000.0, 1.0).of_cells(student, join(class_ids, teacher).double()).sum().backward()
    centred = [values - values.mean(dim=1, keepdim=True) for values in (student.detach(), teacher)]
    expected = (centred[0] - centred[1]) / student.shape[1]
    assert (student.grad - expected).abs().max() < 0.02 * expected.abs().max()


def test_without_the_teacher_it_is_the_loss_of_fine_tuning(tiny_config, random_cells):
    model = ScReformerForCellClassification(tiny_config()).eval()
    class_ids, bins = torch.tensor([0, 2, 1, 1]), random_cells(4)
    expected = model(input_ids=bins, labels=class_ids)
    teacher = torch.randn(4, 3)
    loss = DistillationLoss(2.0, 0.0)(expected, join(class_ids, teacher))
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)


def test_label_smoothing_is_that_of_torch():
    student, teacher, class_ids = draw()
    labelled = class_ids != NO_LABEL
    losses = DistillationLoss(2.0, 0.0, label_smoothing=0.1).of_cells(student, join(class_ids, teacher))
    expected = functional.cross_entropy(student[labelled], class_ids[labelled], label_smoothing=0.1, reduction="none")
    assert torch.allclose(losses[labelled], expected)
    assert float(losses[-1]) == 0


def test_batches_of_a_step_add_up_to_the_mean_over_its_cells():
    student, teacher, class_ids = draw(num_cells=7)
    targets, loss = join(class_ids, teacher), DistillationLoss(2.0, 0.4)
    num_items = torch.tensor(targets.numel())  # as the Trainer counts
    parts = [loss({"logits": student[part]}, targets[part], num_items) for part in (slice(0, 2), slice(2, 7))]
    assert float(sum(parts)) == pytest.approx(float(loss({"logits": student}, targets)), rel=1e-6)


def test_metrics_score_cells_with_a_label_and_agreement_of_all():
    targets = np.array([[0, 9, 0, 0], [1, 9, 0, 0], [NO_LABEL, 0, 0, 9], [NO_LABEL, 9, 0, 0]], dtype=np.float32)
    logits = np.eye(3, dtype=np.float32)[[0, 0, 2, 1]]
    scores = compute_distillation_metrics(SimpleNamespace(predictions=logits, label_ids=targets))
    assert scores["accuracy"] == 0.5
    assert scores["agreement"] == 0.75
    targets[:, 0] = NO_LABEL
    scores = compute_distillation_metrics(SimpleNamespace(predictions=logits, label_ids=targets))
    assert scores == {"agreement": 0.75}


def test_cells_that_only_keep_a_process_busy_count_for_nothing():
    torch.manual_seed(0)
    loss = DistillationLoss(2.0, 0.5)
    logits, targets = torch.randn(4, 3), torch.cat([torch.tensor([[0.0], [2], [-1], [1]]), torch.randn(4, 3)], dim=1)
    filled = torch.cat([targets, torch.full((2, 4), -100.0)])
    extra = torch.cat([logits, torch.randn(2, 3)]).requires_grad_()
    with_fillers = loss({"logits": extra}, filled)
    torch.testing.assert_close(with_fillers, loss({"logits": logits}, targets))
    with_fillers.backward()
    assert not extra.grad[4:].any()
    assert loss({"logits": extra}, filled[4:].repeat(3, 1)) == 0
