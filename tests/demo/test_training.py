"""A training run: it learns, and being cut off does not change what comes out."""

import shutil
from pathlib import Path

import pytest
import torch

import demo.training
from demo.training import BATCH, PEAK_RATE, WARM_UP_STEPS, WINDOW, Run, Step, steps_for
from tests.demo.tiny import TINY, token_ids

LENGTH = 32


class RandomWindows:
    """Other windows at every step, the same whenever they are asked for."""

    def batch(self, step: int, size: int) -> torch.Tensor:
        return token_ids(size, LENGTH + 1, seed=step)


class OneText:
    """The same windows at every step."""

    def batch(self, step: int, size: int) -> torch.Tensor:
        return token_ids(size, LENGTH + 1)


@pytest.fixture(autouse=True)
def _small_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows in a step, on the CPU, and nothing compiled."""
    monkeypatch.setattr(demo.training, "BATCH", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda program: None)


def go_on(run: Run, until: int | None = None, save_every: int = 250) -> list[Step]:
    """The steps that the run makes until number `until`, which cuts it off."""
    made: list[Step] = []

    def on_step(step: Step) -> bool:
        made.append(step)
        return step.number != until

    run.train(RandomWindows(), on_step, save_every=save_every)
    return made


def same_weights(one: Run, two: Run) -> bool:
    return all(map(torch.equal, one.model.state_dict().values(), two.model.state_dict().values()))


def losses(steps: list[Step]) -> list[tuple[int, float, float]]:
    return [(step.number, step.loss, step.balance) for step in steps]


def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    uncut, first = Run(TINY, 4, 0, None), Run(TINY, 4, 0, tmp_path)
    expected = go_on(uncut)
    before = go_on(first, until=2)
    resumed = Run(TINY, 4, 0, tmp_path)
    assert losses(before) + losses(go_on(resumed)) == losses(expected)
    assert same_weights(resumed, uncut)
    assert not same_weights(first, uncut)


def test_a_killed_run_goes_on_from_its_last_save(tmp_path: Path) -> None:
    def killed(step: Step) -> bool:
        if step.number == 3:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        Run(TINY, 4, 0, tmp_path).train(RandomWindows(), killed, save_every=2)
    resumed, uncut = Run(TINY, 4, 0, tmp_path), Run(TINY, 4, 0, None)
    assert resumed.done == 2
    assert losses(go_on(resumed)) == losses(go_on(uncut))[2:]
    assert same_weights(resumed, uncut)


def test_a_run_that_is_done_makes_no_step(tmp_path: Path) -> None:
    done = Run(TINY, 2, 0, tmp_path)
    go_on(done)
    again = Run(TINY, 2, 0, tmp_path)
    assert go_on(again) == []
    assert same_weights(again, done)


def test_processor_time_is_counted_over_the_cut(tmp_path: Path) -> None:
    times = [step.cpu_s for step in go_on(Run(TINY, 4, 0, tmp_path), until=2)]
    times += [step.cpu_s for step in go_on(Run(TINY, 4, 0, tmp_path))]
    assert times == sorted(times)
    assert times[0] > 0


def test_a_save_that_was_cut_off_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "state.partial").write_bytes(b"half of it")
    assert Run(TINY, 4, 0, tmp_path).done == 0


def test_a_run_without_a_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    go_on(Run(TINY, 1, 0, None))
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides_the_first_weights() -> None:
    assert same_weights(Run(TINY, 1, 7, None), Run(TINY, 1, 7, None))
    assert not same_weights(Run(TINY, 1, 7, None), Run(TINY, 1, 8, None))


def test_a_text_that_is_read_again_and_again_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.training, "WARM_UP_STEPS", 5)
    steps: list[Step] = []
    run = Run(TINY, 40, 0, None)
    run.train(OneText(), lambda step: steps.append(step) or True)
    assert steps[0].loss == pytest.approx(torch.tensor(float(TINY.vocab_size)).log().item(), abs=0.01)
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_every_weight_is_trained() -> None:
    run = Run(TINY, 3, 0, None)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    go_on(run)  # the output head is zero in the first step: nothing below gets a gradient yet
    assert [name for name, weight in run.model.named_parameters() if weight.equal(before[name])] == []


def test_the_learning_rate_rises_and_then_falls() -> None:
    run = Run(TINY, 1000, 0, None)
    rates = [run.rate(step) for step in range(1000)]
    top = rates.index(max(rates))
    assert top == WARM_UP_STEPS - 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] == pytest.approx(PEAK_RATE / WARM_UP_STEPS)
    assert rates[-1] == pytest.approx(PEAK_RATE / 50, rel=0.1)


def test_without_decay_the_learning_rate_stays() -> None:
    run = Run(TINY, 1000, 0, None, decay=False)
    assert {run.rate(step) for step in range(WARM_UP_STEPS, 1000)} == {PEAK_RATE}


def test_warming_up_changes_no_weight() -> None:
    warm, cold = Run(TINY, 3, 0, None), Run(TINY, 3, 0, None)
    warm.warm_up(RandomWindows())
    assert same_weights(warm, cold)
    assert losses(go_on(warm)) == losses(go_on(cold))


@pytest.mark.parametrize(
    ("tokens", "steps"), [(0, 0), (1, 1), (BATCH * WINDOW, 1), (BATCH * WINDOW + 1, 2), (10 * BATCH * WINDOW, 10)]
)
def test_steps_are_rounded_up(tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.training, "BATCH", BATCH)
    assert steps_for(tokens) == steps
