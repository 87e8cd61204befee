"""Reading metrics: who is unwell, and what rose although the process that counted was replaced."""

from bench.chaos.counters import Rises, recovery, samples, unwell
from bench.chaos.leaks import more
from frontend.metrics.catalogue import RouterReport
from frontend.metrics.page import ShardReport, render

PAGE = """\
# HELP drover_up 1 if this router or shard has loaded and answers, else 0.
drover_up{model_name="m",part="router-0"} 1.0
drover_up{model_name="m",part="shard-1"} 0.0
drover_shard_linked{model_name="m",router="router-0",shard="shard-0"} 1.0
drover_shard_linked{model_name="m",router="router-0",shard="shard-1"} 0.0
drover_dispatch_retries_total{model_name="m",reason="link down",router="router-0"} 3.0
drover_dispatch_retries_total{model_name="m",reason="link down",router="router-1"} 4.0
drover_requests_replayed_total{model_name="m",router="router-0"} 1.5e+01
drover_generation_tokens_total{model_name="m",router="router-0"} 99.0
"""


def test_a_page_tells_who_is_down_and_which_links() -> None:
    assert unwell(samples(PAGE)) == ["shard-1", "router-0 - shard-1"]
    assert unwell(samples(PAGE.replace(" 0.0", " 1.0"))) == []
    assert unwell([]) == ["no metrics"]


def test_the_real_page_is_understood() -> None:
    page = render("m", [RouterReport("router-0", None, {0: "shard-0"})], [ShardReport("shard-0", 7)]).decode()
    assert unwell(samples(page)) == ["router-0"]


def test_recovery_counters_are_summed_by_reason() -> None:
    assert recovery(samples(PAGE)) == {"dispatch_retries (link down)": 7.0, "requests_replayed": 15.0}


def test_a_counter_that_begins_anew_has_risen_by_what_it_shows() -> None:
    rises = Rises()
    for value in (5.0, 7.0, 2.0, 3.0):
        rises.see({"retries": value})
    assert rises.total == {"retries": 5 + 2 + 2 + 1}


def test_a_leak_is_more_than_before_and_than_pools_may_grow() -> None:
    before = {"processes": {"frontend": 2}, "threads": {"router-0": 30}}
    assert more(before, {"processes": {"frontend": 2}, "threads": {"router-0": 40}}) == []
    assert more(before, {"processes": {"frontend": 3}}) == ["processes of frontend: 2 before, 3 now"]
    assert more(before, {"threads": {"router-0": 90}}) == ["threads of router-0: 30 before, 90 now"]
