"""The laws of a link between processes, each against a real shard in a real process."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from checkpoint.tensors import Checkpoint
from experts.endpoint import Liveness
from experts.errors import ComputeFailed, LinkDown, NotHeld
from experts.link import ExpertRows, LocalLink
from experts.placement import Placement, even_placement
from experts.shard import load_shard
from tests.experts.ends import taken
from tests.experts.shard_process import KERNELS, ShardProcess, rows_like, wire_for
from tests.reference import make_reference

LAYER = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_reference(tmp_path_factory.mktemp("maverick"), "maverick-4-experts").directory)


@pytest.fixture(scope="module")
def placement(checkpoint: Checkpoint) -> Placement:
    return even_placement(checkpoint.config.moe_layers, checkpoint.config.num_experts, 2)


@pytest.fixture(scope="module")
def lasting(checkpoint: Checkpoint, placement: Placement) -> Iterator[ShardProcess]:
    """Shard 0, for tests that leave it as they found it."""
    with ShardProcess(checkpoint.directory, placement, 0) as process:
        yield process


@pytest.fixture
def mortal(checkpoint: Checkpoint, placement: Placement) -> Iterator[ShardProcess]:
    """A shard 0 of the test's own, to be killed."""
    with ShardProcess(checkpoint.directory, placement, 0) as process:
        yield process


@pytest.fixture
def rows(checkpoint: Checkpoint, placement: Placement) -> ExpertRows:
    return ExpertRows(LAYER, [0, 1], [1, 1], [2, 3], rows_like([0, 1], [2, 3], checkpoint.config.hidden_size))


def answered_locally(checkpoint: Checkpoint, placement: Placement, rows: ExpertRows) -> torch.Tensor:
    shard = load_shard(checkpoint, placement.slots_of(0), KERNELS)
    return taken(LocalLink(shard).request(rows))


def test_a_shard_across_processes_answers_what_it_answers_locally(
    checkpoint: Checkpoint, placement: Placement, lasting: ShardProcess, rows: ExpertRows
) -> None:
    link = lasting.link("same", wire_for(checkpoint))
    assert torch.equal(taken(link.request(rows)), answered_locally(checkpoint, placement, rows))


def test_an_expert_that_the_shard_does_not_hold_is_refused(
    checkpoint: Checkpoint, placement: Placement, lasting: ShardProcess, rows: ExpertRows
) -> None:
    link = lasting.link("refusal", wire_for(checkpoint))
    foreign = ExpertRows(LAYER, [0, 3], [1, 1], [2, 3], rows.x_ND)
    with pytest.raises(NotHeld, match="not held"):
        taken(link.request(foreign))
    newer = ExpertRows(LAYER, [0, 1], [1, 2], [2, 3], rows.x_ND)
    with pytest.raises(NotHeld, match="held at version 1, not at version 2"):
        taken(link.request(newer))
    assert taken(link.request(rows)).shape == rows.x_ND.shape


def test_a_computation_that_fails_is_told_apart_from_an_expert_that_is_not_there(
    checkpoint: Checkpoint, lasting: ShardProcess, rows: ExpertRows
) -> None:
    link = lasting.link("failure", wire_for(checkpoint))
    miscounted = ExpertRows(LAYER, [0, 1], [1, 1], [2, 2], rows.x_ND)  # 5 rows
    with pytest.raises(ComputeFailed, match="computing failed: 4 rows in groups, 5 given"):
        taken(link.request(miscounted))
    assert taken(link.request(rows)).shape == rows.x_ND.shape


def test_crossing_sends_finish(checkpoint: Checkpoint, placement: Placement, lasting: ShardProcess) -> None:
    """Requests of full size go out while replies of full size come back."""
    max_rows = 4096
    link = lasting.link("crossing", wire_for(checkpoint, max_rows))
    x_ND = rows_like([0], [max_rows], checkpoint.config.hidden_size)
    replies = [link.request(ExpertRows(LAYER, [0], [1], [max_rows], x_ND)) for _ in range(30)]
    first = taken(replies[0])
    assert all(torch.equal(taken(reply), first) for reply in replies[1:])


def test_a_message_that_does_not_fit_is_caught_by_the_sender(
    checkpoint: Checkpoint, placement: Placement, lasting: ShardProcess, rows: ExpertRows
) -> None:
    link = lasting.link("oversized", wire_for(checkpoint, max_rows=8))
    nine = ExpertRows(LAYER, [0], [1], [9], rows_like([0], [9], checkpoint.config.hidden_size))
    with pytest.raises(AssertionError, match="9 rows for a link of 8"):
        link.request(nine)
    assert taken(link.request(rows)).shape == rows.x_ND.shape


def test_an_idle_link_with_short_timeouts_stays_up(
    checkpoint: Checkpoint, lasting: ShardProcess, rows: ExpertRows
) -> None:
    patience = Liveness(heartbeat_s=0.05, silence_s=1.0)
    link = lasting.link("idle", wire_for(checkpoint), patience, patience)
    never_set = threading.Event()
    assert not never_set.wait(3 * patience.silence_s)  # nothing is sent but heartbeats
    assert link.down_reason is None
    assert taken(link.request(rows)).shape == rows.x_ND.shape


def test_a_reply_that_nobody_waits_for_any_more_is_dropped_and_the_link_goes_on(
    checkpoint: Checkpoint, placement: Placement, lasting: ShardProcess, rows: ExpertRows
) -> None:
    link = lasting.link("late", wire_for(checkpoint))
    lasting.gate.clear()
    late = link.request(rows)
    assert not late.done
    del late
    lasting.gate.set()
    other = ExpertRows(LAYER, [1], [1], [4], rows_like([1], [4], checkpoint.config.hidden_size, seed=1))
    assert torch.equal(taken(link.request(other)), answered_locally(checkpoint, placement, other))


def test_a_killed_shard_is_noticed_at_once_and_other_links_never_notice(
    checkpoint: Checkpoint, lasting: ShardProcess, mortal: ShardProcess, rows: ExpertRows
) -> None:
    doomed = mortal.link("doomed", wire_for(checkpoint), Liveness(0.1, 60.0))  # not by silence
    other = lasting.link("bystander", wire_for(checkpoint))
    mortal.gate.clear()
    reply = doomed.request(rows)
    mortal.kill()
    with pytest.raises(LinkDown, match="lost"):
        taken(reply)
    assert taken(other.request(rows)).shape == rows.x_ND.shape
    with pytest.raises(LinkDown):
        doomed.request(rows)


def test_a_silent_shard_is_declared_dead_and_may_come_back_under_a_new_name(
    checkpoint: Checkpoint, mortal: ShardProcess, rows: ExpertRows
) -> None:
    silence_s = 0.8
    link = mortal.link("silent", wire_for(checkpoint), Liveness(0.1, silence_s), Liveness(0.1, silence_s))
    mortal.stop()
    began = time.monotonic()
    with pytest.raises(LinkDown):
        taken(link.request(rows))
    assert time.monotonic() - began < 10 * silence_s  # far from the reply deadline of 30 s
    mortal.resume()
    again = mortal.link("silent-2", wire_for(checkpoint))
    assert taken(again.request(rows)).shape == rows.x_ND.shape


def test_a_closed_link_leaves_no_thread(checkpoint: Checkpoint, lasting: ShardProcess) -> None:
    link = lasting.link("closed", wire_for(checkpoint))
    link.close()
    assert not [thread for thread in threading.enumerate() if thread.name.endswith(" closed")]
