from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResizeRequest(_message.Message):
    __slots__ = ("operation_id", "shards", "routers", "frontends", "replicas")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    FRONTENDS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    shards: int
    routers: int
    frontends: int
    replicas: int
    def __init__(self, operation_id: _Optional[str] = ..., shards: _Optional[int] = ..., routers: _Optional[int] = ..., frontends: _Optional[int] = ..., replicas: _Optional[int] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("operation_id", "imbalance_before", "imbalance_after", "moved_bytes", "gain_tokens_per_s", "is_accepted", "reason", "moves")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GAIN_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    IS_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    imbalance_before: float
    imbalance_after: float
    moved_bytes: int
    gain_tokens_per_s: float
    is_accepted: bool
    reason: str
    moves: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, operation_id: _Optional[str] = ..., imbalance_before: _Optional[float] = ..., imbalance_after: _Optional[float] = ..., moved_bytes: _Optional[int] = ..., gain_tokens_per_s: _Optional[float] = ..., is_accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., moves: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("target", "grace_s")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    target: str
    grace_s: float
    def __init__(self, target: _Optional[str] = ..., grace_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("is_done", "left")
    class LeftEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    IS_DONE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    is_done: bool
    left: _containers.ScalarMap[str, str]
    def __init__(self, is_done: _Optional[bool] = ..., left: _Optional[_Mapping[str, str]] = ...) -> None: ...

class UndrainRequest(_message.Message):
    __slots__ = ("target",)
    TARGET_FIELD_NUMBER: _ClassVar[int]
    target: str
    def __init__(self, target: _Optional[str] = ...) -> None: ...

class UndrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseAutoscalingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseAutoscalingResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeAutoscalingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeAutoscalingResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Operation(_message.Message):
    __slots__ = ("operation_id", "kind", "phase", "text", "step", "steps", "waits_for", "moved_bytes", "total_bytes", "reason")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    kind: str
    phase: str
    text: str
    step: int
    steps: int
    waits_for: str
    moved_bytes: int
    total_bytes: int
    reason: str
    def __init__(self, operation_id: _Optional[str] = ..., kind: _Optional[str] = ..., phase: _Optional[str] = ..., text: _Optional[str] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., waits_for: _Optional[str] = ..., moved_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Part(_message.Message):
    __slots__ = ("name", "phase", "node", "error", "restarts", "running", "waiting", "tokens_per_s", "experts_held", "experts_wanted")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HELD_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_WANTED_FIELD_NUMBER: _ClassVar[int]
    name: str
    phase: str
    node: str
    error: str
    restarts: int
    running: int
    waiting: int
    tokens_per_s: float
    experts_held: int
    experts_wanted: int
    def __init__(self, name: _Optional[str] = ..., phase: _Optional[str] = ..., node: _Optional[str] = ..., error: _Optional[str] = ..., restarts: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., experts_held: _Optional[int] = ..., experts_wanted: _Optional[int] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("layer", "load", "copies")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    load: _containers.RepeatedScalarFieldContainer[float]
    copies: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., load: _Optional[_Iterable[float]] = ..., copies: _Optional[_Iterable[int]] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("routers", "shards", "operation", "autoscaling", "layers", "problems")
    class ProblemsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALING_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    routers: _containers.RepeatedCompositeFieldContainer[Part]
    shards: _containers.RepeatedCompositeFieldContainer[Part]
    operation: Operation
    autoscaling: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    problems: _containers.ScalarMap[str, str]
    def __init__(self, routers: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., operation: _Optional[_Union[Operation, _Mapping]] = ..., autoscaling: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., problems: _Optional[_Mapping[str, str]] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("after", "follow")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    after: int
    follow: bool
    def __init__(self, after: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("number", "time_s", "kind", "subject", "text", "data_json")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_JSON_FIELD_NUMBER: _ClassVar[int]
    number: int
    time_s: float
    kind: str
    subject: str
    text: str
    data_json: str
    def __init__(self, number: _Optional[int] = ..., time_s: _Optional[float] = ..., kind: _Optional[str] = ..., subject: _Optional[str] = ..., text: _Optional[str] = ..., data_json: _Optional[str] = ...) -> None: ...
