"""The door to torch: one MoE block spread over ranks, exact under any plan. Not pure; called by training loops.

    hidden [T, H] -> route (recorded ids, live probabilities) -> dispatch (all-to-all) -> experts -> combine -> [T, H]

Each token-slot goes to the rank that the plan's quotas name; those beyond the quotas, which nobody foresaw, go to the
expert's home, so the result is exact for any tokens. Results come back to the place they left from and are summed in
logical top-k order, never in order of arrival. Every rank takes part in every exchange, also with no tokens at all, in
the forward pass, in the backward pass and when activations are computed again.
Written for Hugging Face's fused experts (Qwen3-MoE, Mixtral, OLMoE, DeepSeek-V3): `gate_up_proj` [experts, 2 * inner,
hidden], `down_proj`. In bitwise mode (`block_rows` > 0) whole blocks of token-slots travel, see canonical.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from outrider.errors import CallerError
from outrider.experts.bank import Bank, Blocks, inside_backward
from outrider.experts.canonical import CHUNK, Combine, Dispatch, ExactRouter, Sums
from outrider.experts.events import Array
from outrider.experts.watched import watched


class SpreadBlock(nn.Module):
    """A sparse MoE block whose experts are spread over the ranks of `group`; parameters keep their names.

    block_rows  0, or bitwise mode with blocks of so many token-slots
    """

    def __init__(self, block: nn.Module, homes_E: Array, group: dist.ProcessGroup, block_rows: int = 0) -> None:
        super().__init__()
        assert isinstance(block.gate, nn.Module)
        self.gate, self.group, self.homes = block.gate, group, torch.from_numpy(homes_E)
        self.experts = Bank(block.experts, homes_E, group.rank(), block_rows)  # type: ignore[arg-type]
        self.shared_experts: Any = getattr(block, "shared_experts", None)  # DeepSeek-V3's stay whole on every rank
        for name, _ in block.named_children():  # parameters in the plain model's order: optimizers number them by it
            self._modules[name] = self._modules.pop(name)
        self.router_sums = Sums()
        self.seen_E = torch.zeros(len(homes_E), dtype=torch.int64)
        self.routes: Tensor | None = None
        self.real: Tensor | None = None
        self.ask: Callable[[Array], None] | None = None  # reactive: told counts_RE once a micro-step, it calls `use`
        self.asked = False
        self._known = False  # how the gate weighs experts
        self._upto_ER = torch.zeros((len(homes_E), group.size()), dtype=torch.int64)

    def __getstate__(self) -> Any:
        """copy.deepcopy and pickle ask for it. CallerError."""
        raise CallerError(
            "a balanced model is neither copied nor pickled: its blocks hold process groups. Copy the plain model"
            " before balance(), or load balanced.state_dict() into a plain one."
        )

    def use(self, quotas: Array) -> None:
        """Take the quotas of this layer, rows (expert, source, rank, tokens)."""
        quota_ER = np.zeros(tuple(self._upto_ER.shape), dtype=np.int64)
        mine = quotas if self.experts.block_rows else quotas[quotas[:, 1] == self.group.rank()]
        np.add.at(quota_ER, (mine[:, 0], mine[:, 2]), mine[:, 3])
        self._upto_ER = torch.from_numpy(quota_ER.cumsum(axis=1))

    def replay(self, routes: Tensor | None, real: Tensor | None) -> None:
        """What the next forward pass runs.

        routes  [T, top_k] recorded expert ids; a row with a negative id, or None, is routed by the live gate
        real    [T] bool; tokens that are padding are not computed and get zeros; None: all are real
        """
        self.routes, self.real = routes, real

    def forward(self, hidden_states: Tensor) -> Tensor:
        with watched(f"layer {self.experts.layer} exchanged tokens, which all ranks must do equally often"):
            return self._spread(hidden_states)

    def _spread(self, hidden_states: Tensor) -> Tensor:
        everything = hidden_states.reshape(-1, hidden_states.shape[-1])
        self._check(len(everything))
        real = torch.arange(len(everything)) if self.real is None else self.real.nonzero().view(-1)
        real = real.to(everything.device)
        tokens, exact = everything[real], self.experts.block_rows > 0
        route = self._route_exactly if exact else self._route
        routes = None if self.routes is None else self.routes.to(everything.device)[real]
        chosen, weights = route(tokens, routes)
        chosen = chosen.cpu()  # who computes what is found out on the host, which must know all sizes anyway
        top_k, count_E = chosen.shape[1], torch.bincount(chosen.reshape(-1), minlength=len(self.homes))
        if not inside_backward():  # else activations are computed again
            self.seen_E += count_E
        counts_RE = self._gathered(count_E) if exact or self.ask else None
        if self.ask and counts_RE is not None and not self.asked:
            self.asked = True  # one plan a micro-step: computing activations again replays it
            self.ask(counts_RE.numpy())
        blocks, leaves_E = None, []
        if exact and counts_RE is not None:
            order, sent_RE, received_RE, blocks = self._address_blocks(chosen.reshape(-1), counts_RE)
            leaves_E = (-(-counts_RE.sum(0) // self.experts.block_rows)).tolist()
        else:
            order, sent_RE = self._address(chosen.reshape(-1))
            received_RE = torch.empty_like(sent_RE)
            dist.all_to_all_single(received_RE, sent_RE, group=self.group)
        send, receive = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()

        order = order.to(tokens.device)
        rows: Tensor = Dispatch.apply(tokens, order, top_k)  # type: ignore[no-untyped-call]
        arrived = _exchange(rows, send, receive, self.group)
        returned = _exchange(self.experts(arrived, received_RE, blocks, leaves_E), receive, send, self.group)
        by_token = returned[order.argsort()].view(len(real), top_k, tokens.shape[1])
        total: Tensor = Combine.apply(by_token, weights)  # type: ignore[no-untyped-call]
        result = torch.zeros_like(everything).index_copy(0, real, total.to(everything.dtype)).view_as(hidden_states)
        return result if self.shared_experts is None else result + self.shared_experts(hidden_states)

    def _check(self, tokens: int) -> None:
        for name, given in (("routes", self.routes), ("real", self.real)):
            if given is not None and len(given) != tokens:
                raise CallerError(
                    f"{name}: {len(given)} tokens, and layer {self.experts.layer} was given {tokens}. Give a row for"
                    " every token of this rank's micro-batch, padding included."
                )

    def _check_gate(self, logits: Tensor, weights: Tensor, chosen: Tensor) -> None:
        """Once: are the gate's own weights what `weights_of` makes of its choice?"""
        if self._known or not len(chosen):
            return
        with torch.no_grad():  # whoever computes activations again must find the same graph
            ours = weights_of(self.gate, logits, chosen).to(weights.dtype)
        if ours.shape != weights.shape or not torch.allclose(ours, weights, rtol=0.02, atol=1e-3):
            raise CallerError(
                f"routes: {type(self.gate).__name__} weighs experts in a way unknown to replay. Leave routes out."
            )
        self._known = True

    def _route(self, tokens: Tensor, routes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Expert ids [T, top_k] and their weights, from the live probabilities (router gradients stay whole)."""
        logits, weights, chosen = self.gate(tokens)
        if routes is None:
            return chosen, weights
        self._check_gate(logits, weights, chosen)
        recorded = (routes >= 0).all(dim=1, keepdim=True)
        both = torch.where(recorded, routes.to(chosen.dtype), chosen)
        return both, weights_of(self.gate, logits, both).to(weights.dtype)

    def _route_exactly(self, tokens: Tensor, routes: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `_route`, in pieces of CHUNK tokens, the last one padded, so that a row's bits are its own."""
        tokens_R = self._gathered(torch.tensor([len(tokens)]))
        first, weight = int(tokens_R[: self.group.rank()].sum()), self.gate.weight
        assert isinstance(weight, Tensor)
        router = ExactRouter(weight, self.router_sums, int(tokens_R.sum()))
        parts = []
        for begin in range(0, max(1, len(tokens)), CHUNK):
            some = tokens[begin : begin + CHUNK]
            router.first, router.real = first + begin, len(some)
            rest = some.new_zeros((CHUNK - len(some), some.shape[1]))
            ids = None if routes is None else routes[begin : begin + CHUNK]
            if ids is not None:
                ids = torch.cat([ids, ids.new_full((CHUNK - len(ids), ids.shape[1]), -1)])
            with router:
                parts.append([out[: len(some)] for out in self._route(torch.cat([some, rest]), ids)])
        chosen, weights = (torch.cat(list(out)) for out in zip(*parts, strict=True))
        return chosen, weights

    def _gathered(self, mine: Tensor) -> Tensor:
        everyone = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(everyone, mine, group=self.group)
        return torch.stack(everyone)

    def _rank_of(self, expert: Tensor, place: Tensor) -> Tensor:
        """Who computes the token-slot that is number `place` of its expert; beyond the quotas: home."""
        rank = (self._upto_ER[expert] <= place[:, None]).sum(1)
        return torch.where(rank == self._upto_ER.shape[1], self.homes[expert], rank)

    def _address(self, expert: Tensor) -> tuple[Tensor, Tensor]:
        """Order in which the token-slots leave, by (rank, expert, place in the batch), and how many: sent_RE."""
        by_expert, sorted_expert, place = _placed(expert, len(self.homes))
        return self._leaving(by_expert, sorted_expert, self._rank_of(sorted_expert, place))

    def _leaving(self, by_expert: Tensor, sorted_expert: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        experts, ranks = self._upto_ER.shape
        sent_RE = torch.bincount(rank * experts + sorted_expert, minlength=ranks * experts).view(ranks, experts)
        return by_expert[rank.argsort(stable=True)], sent_RE

    def _address_blocks(self, expert: Tensor, counts_RE: Tensor) -> tuple[Tensor, Tensor, Tensor, Blocks]:
        """As `_address`, by whole blocks: a block goes where its first token-slot would; also who sends how many here.

        Counts of all ranks are known, so each rank finds every token-slot's place in canonical order for itself.
        """
        ranks, experts = counts_RE.shape
        size, me = self.experts.block_rows, self.group.rank()
        by_expert, sorted_expert, place = _placed(expert, experts)
        place += (counts_RE.cumsum(0) - counts_RE)[me][sorted_expert]
        order, sent_RE = self._leaving(by_expert, sorted_expert, self._rank_of(sorted_expert, place // size * size))

        total_E = counts_RE.sum(0)
        expert_of = torch.arange(experts).repeat_interleave(total_E)
        source_of = torch.arange(ranks).repeat(experts).repeat_interleave(counts_RE.T.reshape(-1))
        place_of = torch.arange(len(expert_of)) - (total_E.cumsum(0) - total_E)[expert_of]
        here = self._rank_of(expert_of, place_of // size * size) == me
        received = torch.bincount(source_of[here] * experts + expert_of[here], minlength=ranks * experts)
        blocks: dict[int, list[tuple[int, int]]] = {}
        pairs, rows = torch.unique(torch.stack([expert_of, place_of // size])[:, here], dim=1, return_counts=True)
        for e, number, n in zip(*pairs.tolist(), rows.tolist(), strict=True):
            blocks.setdefault(e, []).append((number, n))
        return order, sent_RE, received.view(ranks, experts), blocks


def _placed(expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token-slots by expert (stable), their experts, and the number of each among its expert's."""
    by_expert = expert.argsort(stable=True)
    sorted_expert = expert[by_expert]
    count_E = torch.bincount(expert, minlength=experts)
    return by_expert, sorted_expert, torch.arange(len(expert)) - (count_E.cumsum(0) - count_E)[sorted_expert]


def weights_of(gate: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """What the gate gives to experts that it may not have chosen, as its own class does for those that it chooses."""
    sigmoid = hasattr(gate, "e_score_correction_bias")  # DeepSeek-V3; its bias steers the choice, not the weights
    scores = logits.sigmoid() if sigmoid else torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights = scores.gather(1, chosen)
    if getattr(gate, "norm_topk_prob", True):  # Mixtral's has no such setting and always does
        weights = weights / (weights.sum(dim=-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
    return weights * getattr(gate, "routed_scaling_factor", 1.0)


PARTS = ("gate", "experts", "shared_experts")  # what a block may consist of


def spread(model: nn.Module, homes_E: Array, group: dist.ProcessGroup, block_rows: int = 0) -> list[SpreadBlock]:
    """Replace every sparse MoE block of a model by one that keeps only this rank's experts; the blocks, by layer.

    Other parameters stay whole on every rank. Raises CallerError for a model without fused MoE experts, and for blocks
    that have parts which would be lost.
    """
    found = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if hasattr(child, "gate") and hasattr(getattr(child, "experts", None), "gate_up_proj")
    ]
    if not found:
        raise CallerError(f"{type(model).__name__}: no MoE block with fused experts. Give a Qwen3-MoE-shaped model.")
    blocks = []
    for parent, name, child in found:
        strange = [part for part, _ in child.named_children() if part not in PARTS]
        experts: Any = child.experts
        strange += [part for part, _ in experts.named_parameters() if part not in ("gate_up_proj", "down_proj")]
        if strange or getattr(child, "jitter_noise", None):
            what = ", ".join(strange) or "router_jitter_noise"
            raise CallerError(f"{type(child).__name__}: {what} cannot be spread. Give a block of {', '.join(PARTS)}.")
        blocks.append(SpreadBlock(child, homes_E, group, block_rows))
        setattr(parent, name, blocks[-1])
    return blocks


class _AllToAll(torch.autograd.Function):
    """Rows out by `send` counts, rows in by `receive` counts; the gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        arrived = rows.new_empty((sum(receive), rows.shape[1]))
        dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0]
        back = gradient.new_empty((sum(ctx.send), gradient.shape[1]))
        dist.all_to_all_single(back, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return back, None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived: Tensor = _AllToAll.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]
    return arrived
