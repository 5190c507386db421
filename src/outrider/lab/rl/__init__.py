"""One policy-gradient step of a MoE model on a few ranks, balanced and not: where experts meets a real model."""
