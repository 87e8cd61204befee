"""Loading fails, is tried again, and succeeds; whoever asks meanwhile learns why."""

import threading

from checkpoint.errors import CheckpointError
from cluster.actors.load_progress import LoadProgress
from cluster.reports import Phase
from tests.processes import PATIENCE_S, wait_until


def test_a_load_is_tried_again_until_it_succeeds() -> None:
    progress, allowed = LoadProgress(), threading.Semaphore(0)
    errors: list[Exception] = [CheckpointError("config.json: is not there"), MemoryError("no room")]

    def load() -> None:
        progress.expect(100)
        progress.add_bytes(60)
        assert allowed.acquire(timeout=PATIENCE_S)
        if errors:
            raise errors.pop(0)

    thread = threading.Thread(target=progress.run, args=(load, 0.2))
    thread.start()
    for reason in ("config.json: is not there", "MemoryError: no room"):
        wait_until(lambda: progress.state().phase is Phase.LOADING)
        assert progress.state().bytes_done == 60  # of this try, not of all
        allowed.release()
        wait_until(lambda: progress.state().phase is Phase.FAILED)
        state = progress.state()
        assert state.error == reason
        assert state.retry_s is not None
        assert state.summary.startswith(f"failed: {reason}; next try in ")
    allowed.release()
    thread.join(PATIENCE_S)
    state = progress.state()
    assert (state.phase, state.error, state.retry_s, state.bytes_done) == (Phase.READY, "", None, 60)
