"""The chunked loss on a GPU, in bf16, against fp32 over full logits."""

from __future__ import annotations

import torch

from megatron_rapo.loss.chunked import Head, ReferenceStates, chunked_loss
from megatron_rapo.loss.vocabulary import VocabularyShard
from tests.gpu import needs_cuda
from tests.unit.one_rank import one_rank

TOKENS, HIDDEN, ROWS = 257, 128, 5003


@needs_cuda
def test_gradients_equal_full_logits(tmp_path):
    torch.manual_seed(0)
    hidden, reference_hidden = (
        torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in "ab"
    )
    weight, reference_weight = (
        torch.randn(ROWS, HIDDEN, device="cuda", dtype=torch.bfloat16) * HIDDEN**-0.5 for _ in "ab"
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.randint(0, ROWS, (TOKENS,), device="cuda")
    phi = torch.rand(TOKENS, device="cuda")

    def token_loss(s, rows):
        return -s.log_prob + 0.3 * s.forward_kl - 0.2 * s.entropy

    with one_rank(tmp_path):
        head = Head(weight, VocabularyShard.of(ROWS, ROWS, torch.distributed.group.WORLD), 1.0, 64)
        reference = ReferenceStates(reference_hidden, reference_weight, phi, forward=True, reverse=False)
        loss = chunked_loss(hidden, targets, head, token_loss, reference)
        loss.backward()
    found = loss.detach(), hidden.grad.float(), weight.grad.float()

    exact_hidden, exact_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    log_policy = (exact_hidden @ exact_weight.T).log_softmax(-1)
    flattened = (phi[:, None] * (reference_hidden.float() @ reference_weight.float().T)).log_softmax(-1)
    per_token = (
        -log_policy.gather(1, targets[:, None]).squeeze(1)
        + 0.3 * (flattened.exp() * (flattened - log_policy)).sum(-1)
        + 0.2 * (log_policy.exp() * log_policy).sum(-1)
    )
    per_token.sum().backward()
    expected = per_token.sum().detach(), exact_hidden.grad, exact_weight.grad
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 2e-2
