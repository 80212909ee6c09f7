import math

import pytest
import torch

from gemify.paper.objectives import Temperature, info_nce, next_token_loss, total_loss
from gemify.paper.tokens import IGNORED


def test_info_nce_of_zeros_is_log_of_the_candidates() -> None:
    zero = torch.zeros(7, 5)
    assert info_nce(zero, zero, 20.0).item() == pytest.approx(math.log(7))
    assert info_nce(zero, zero, 20.0, negatives_ND=torch.zeros(3, 5)).item() == pytest.approx(math.log(10))


def test_info_nce_is_the_paper_formula() -> None:
    torch.manual_seed(0)
    q, d = torch.randn(5, 8), torch.randn(5, 8)
    expected = 0.0
    for i in range(5):
        s = [torch.cosine_similarity(q[i], d[j], dim=0).item() * 20 for j in range(5)]
        expected -= math.log(math.exp(s[i]) / sum(math.exp(v) for v in s)) / 5
    assert info_nce(q, d, 20.0).item() == pytest.approx(expected, rel=1e-5)


def test_autocast_does_not_round_the_logits() -> None:
    torch.manual_seed(0)
    q, d = torch.randn(5, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = info_nce(q, d, 100.0)
    assert rounded.item() == info_nce(q, d, 100.0).item()


def test_orthogonal_pairs_have_a_closed_form() -> None:
    eye = torch.eye(4)
    assert info_nce(eye, eye, 3.0).item() == pytest.approx(math.log(1 + 3 * math.exp(-3.0)))


def test_temperature_starts_at_twenty_and_stays_in_its_range() -> None:
    temperature = Temperature()
    assert temperature().item() == pytest.approx(20.0)
    for value, expected in ((9.0, 100.0), (-3.0, 1.0)):
        with torch.no_grad():
            temperature.t.fill_(value)
        scale = temperature()
        assert scale.item() == pytest.approx(expected, rel=1e-6)
        scale.backward()
        assert temperature.t.grad is not None
        assert temperature.t.grad.item() != 0.0  # at the border it can still move back
        temperature.t.grad = None


def test_next_token_loss_sums_over_targets_only() -> None:
    logits = torch.randn(4, 9)
    targets = torch.tensor([2, IGNORED, 8, IGNORED])
    expected = -logits.log_softmax(-1)[[0, 2], [2, 8]].sum()
    assert next_token_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    split = next_token_loss(logits[:2], targets[:2]) + next_token_loss(logits[2:], targets[2:])
    assert split.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_weight_of_zero_switches_an_objective_off_exactly() -> None:
    ntp, contrastive = torch.tensor(3.0), torch.tensor(float("nan"))
    assert total_loss(ntp, contrastive, 0.0).item() == 3.0
    assert total_loss(ntp, None, 0.0).item() == 3.0
    assert total_loss(None, torch.tensor(2.0), 1.0).item() == 2.0
    assert total_loss(torch.tensor(1.0), torch.tensor(5.0), 0.25).item() == 2.0


@pytest.mark.parametrize(
    ("ntp", "contrastive", "alpha"), [(None, torch.tensor(1.0), 0.5), (torch.tensor(1.0), None, 1.0)]
)
def test_a_missing_part_is_refused(ntp: torch.Tensor | None, contrastive: torch.Tensor | None, alpha: float) -> None:
    with pytest.raises(ValueError, match="was not computed"):
        total_loss(ntp, contrastive, alpha)


def test_alpha_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        total_loss(torch.tensor(1.0), torch.tensor(1.0), 1.5)
