"""Small clusters in this process, and what they must compute."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from experts.errors import LinkDown
from experts.link import ExpertRows, LocalLink, Reply
from experts.link_table import LinkTable
from experts.placement import Placement, even_placement
from experts.shard import ExpertShard
from experts.slots import HeldExpert, Slots
from kernels.choose import choose_kernels
from kernels.grouped_mlp import grouped_mlp_reference
from router.model.dispatch import Dispatcher

EXPERTS, HIDDEN, WIDTH = 8, 16, 12
LAYER, OTHER_LAYER = 3, 5
CPU = torch.device("cpu")
KERNELS = choose_kernels(CPU, torch.float32, 1)
DEAD = "lost: the peer is gone"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GATE_UP_EDF2, DOWN_EFD = random(EXPERTS, HIDDEN, 2 * WIDTH, seed=1) * 0.3, random(EXPERTS, WIDTH, HIDDEN, seed=2) * 0.3


def make_shard(placement: Placement, number: int) -> ExpertShard:
    """Layer numbers are in the weights, so that rows sent to a wrong layer come back wrong."""
    slots = Slots()
    slots.change(
        {
            (layer, expert): HeldExpert(
                version, KERNELS.expert((GATE_UP_EDF2[expert] * layer).t(), DOWN_EFD[expert].t())
            )
            for (layer, expert), version in placement.slots_of(number).items()
        }
    )
    return ExpertShard(slots, KERNELS)


class RecordingLink(LocalLink):
    """A real link that remembers what it carried."""

    def __init__(self, shard: ExpertShard) -> None:
        super().__init__(shard)
        self.carried: list[ExpertRows] = []

    def request(self, rows: ExpertRows) -> Reply:
        self.carried.append(rows)
        return super().request(rows)


@dataclass
class DownLink:
    """A link whose shard died, before or after it took the rows."""

    takes_rows: bool = False
    down_reason: str = field(default=DEAD, init=False)
    is_loaded = True
    done = True
    answered_s = None

    def request(self, rows: ExpertRows) -> Reply:
        if not self.takes_rows:
            raise LinkDown(self.down_reason)
        return self

    def take(self) -> torch.Tensor:
        raise LinkDown(self.down_reason)

    def close(self) -> None:
        pass


@dataclass
class Cluster:
    """A dispatcher, its link table, and the links that it began with."""

    placement: Placement
    links: list[RecordingLink] = field(init=False)
    table: LinkTable = field(init=False)
    dispatcher: Dispatcher = field(init=False)

    def __post_init__(self) -> None:
        self.links = [RecordingLink(make_shard(self.placement, number)) for number in range(self.placement.num_shards)]
        self.table = LinkTable(dict(enumerate(self.links)))
        self.dispatcher = Dispatcher(self.placement, self.table)

    @property
    def carried(self) -> list[int]:
        """Rows that each link has carried."""
        return [sum(sum(rows.counts) for rows in link.carried) for link in self.links]


def make_dispatcher(placement: Placement) -> tuple[Dispatcher, list[RecordingLink]]:
    cluster = Cluster(placement)
    return cluster.dispatcher, cluster.links


def even(num_shards: int) -> Placement:
    return even_placement([LAYER, OTHER_LAYER], EXPERTS, num_shards)


def run(dispatcher: Dispatcher, x_TD: torch.Tensor, expert_TA: torch.Tensor, layer: int = LAYER) -> torch.Tensor:
    return dispatcher.combine(dispatcher.dispatch(layer, x_TD, expert_TA, scores_for(expert_TA)))


def scores_for(expert_TA: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(random(*expert_TA.shape, seed=3))


def plain_formula(x_TD: torch.Tensor, expert_TA: torch.Tensor, layer: int = LAYER) -> torch.Tensor:
    """sum over each token's experts of expert(score * x)."""
    scored_TAD = x_TD[:, None, :] * scores_for(expert_TA)[:, :, None]
    y_ND = grouped_mlp_reference(scored_TAD.flatten(0, 1), GATE_UP_EDF2 * layer, DOWN_EFD, expert_TA.flatten())
    return y_ND.view(*expert_TA.shape, HIDDEN).sum(dim=1)


def assert_plain(dispatcher: Dispatcher, expert_TA: torch.Tensor, layer: int = LAYER) -> None:
    x_TD = random(len(expert_TA), HIDDEN, seed=4)
    expected_TD = plain_formula(x_TD, expert_TA, layer)
    torch.testing.assert_close(run(dispatcher, x_TD, expert_TA, layer), expected_TD, rtol=1e-5, atol=1e-5)


def choose(tokens: int, top_k: int, among: Sequence[int] = range(EXPERTS)) -> torch.Tensor:
    """expert_TA: random, different experts for each token, in no order."""
    places_TA = random(tokens, len(among), seed=5).topk(top_k, dim=-1).indices
    return torch.tensor(list(among))[places_TA]
