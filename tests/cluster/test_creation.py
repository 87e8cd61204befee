"""What an actor gets of its blueprint; creating actors needs Ray and is tested with deployments."""

import pickle
from dataclasses import dataclass

from cluster.actors.creation import _Sealed


@dataclass(frozen=True)
class Spec:
    name: str
    threads: int = 2


def test_a_spec_arrives_with_the_changes_of_the_part_that_it_is_for() -> None:
    spec = pickle.dumps(Spec("shard-0"))
    assert pickle.loads(pickle.dumps(_Sealed(spec, None))) == Spec("shard-0")
    changed = _Sealed(spec, pickle.dumps({"name": "shard-7"}))
    assert pickle.loads(pickle.dumps(changed)) == Spec("shard-7", 2)
