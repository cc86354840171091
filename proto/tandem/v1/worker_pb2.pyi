from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Event(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_UNSPECIFIED: _ClassVar[Event]
    EVENT_ARRIVED: _ClassVar[Event]
    EVENT_TOKENIZED: _ClassVar[Event]
    EVENT_ROUTED: _ClassVar[Event]
    EVENT_RECEIVED: _ClassVar[Event]
    EVENT_PREFILL_ORDERED: _ClassVar[Event]
    EVENT_PREFILL_QUEUED: _ClassVar[Event]
    EVENT_PREFILL_SCHEDULED: _ClassVar[Event]
    EVENT_BLOCKS_RESERVED: _ClassVar[Event]
    EVENT_PREFILL_FINISHED: _ClassVar[Event]
    EVENT_BLOCKS_READ: _ClassVar[Event]
    EVENT_HANDOFF_CONFIRMED: _ClassVar[Event]
    EVENT_DECODE_JOINED: _ClassVar[Event]
    EVENT_FIRST_TOKEN: _ClassVar[Event]
    EVENT_FINISHED: _ClassVar[Event]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
    FINISH_REASON_MOVED: _ClassVar[FinishReason]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    ERROR_CODE_INVALID: _ClassVar[ErrorCode]
    ERROR_CODE_OVERLOADED: _ClassVar[ErrorCode]
    ERROR_CODE_UNAVAILABLE: _ClassVar[ErrorCode]
    ERROR_CODE_INTERNAL: _ClassVar[ErrorCode]
    ERROR_CODE_DEADLINE: _ClassVar[ErrorCode]
EVENT_UNSPECIFIED: Event
EVENT_ARRIVED: Event
EVENT_TOKENIZED: Event
EVENT_ROUTED: Event
EVENT_RECEIVED: Event
EVENT_PREFILL_ORDERED: Event
EVENT_PREFILL_QUEUED: Event
EVENT_PREFILL_SCHEDULED: Event
EVENT_BLOCKS_RESERVED: Event
EVENT_PREFILL_FINISHED: Event
EVENT_BLOCKS_READ: Event
EVENT_HANDOFF_CONFIRMED: Event
EVENT_DECODE_JOINED: Event
EVENT_FIRST_TOKEN: Event
EVENT_FINISHED: Event
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason
FINISH_REASON_MOVED: FinishReason
ERROR_CODE_UNSPECIFIED: ErrorCode
ERROR_CODE_INVALID: ErrorCode
ERROR_CODE_OVERLOADED: ErrorCode
ERROR_CODE_UNAVAILABLE: ErrorCode
ERROR_CODE_INTERNAL: ErrorCode
ERROR_CODE_DEADLINE: ErrorCode

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "rank")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: TokenLogprob
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, chosen: _Optional[_Union[TokenLogprob, _Mapping]] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Stamp(_message.Message):
    __slots__ = ("event", "unix_s")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    event: Event
    unix_s: float
    def __init__(self, event: _Optional[_Union[Event, str]] = ..., unix_s: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("router_id", "protocol_version", "heartbeat_s", "features")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    protocol_version: str
    heartbeat_s: float
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, router_id: _Optional[str] = ..., protocol_version: _Optional[str] = ..., heartbeat_s: _Optional[float] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...

class PromptHashes(_message.Message):
    __slots__ = ("root", "block_size", "hashes")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    block_size: int
    hashes: bytes
    def __init__(self, root: _Optional[bytes] = ..., block_size: _Optional[int] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("handle", "request_id", "model", "prompt_token_ids", "sampling", "priority", "cache_salt", "prefill_targets", "timeout_s", "prefix_sources", "prompt_hashes", "resumed_token_ids", "move", "token_lists", "adapter", "tpot_objective_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TARGETS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SOURCES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASHES_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LISTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TPOT_OBJECTIVE_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    model: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    priority: int
    cache_salt: str
    prefill_targets: _containers.RepeatedCompositeFieldContainer[PrefillTarget]
    timeout_s: float
    prefix_sources: _containers.RepeatedCompositeFieldContainer[PrefixSource]
    prompt_hashes: PromptHashes
    resumed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    move: Move
    token_lists: int
    adapter: str
    tpot_objective_s: float
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., prefill_targets: _Optional[_Iterable[_Union[PrefillTarget, _Mapping]]] = ..., timeout_s: _Optional[float] = ..., prefix_sources: _Optional[_Iterable[_Union[PrefixSource, _Mapping]]] = ..., prompt_hashes: _Optional[_Union[PromptHashes, _Mapping]] = ..., resumed_token_ids: _Optional[_Iterable[int]] = ..., move: _Optional[_Union[Move, _Mapping]] = ..., token_lists: _Optional[int] = ..., adapter: _Optional[str] = ..., tpot_objective_s: _Optional[float] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("worker_id", "incarnation", "kv_address", "transfer_id", "num_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    kv_address: str
    transfer_id: bytes
    num_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., kv_address: _Optional[str] = ..., transfer_id: _Optional[bytes] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class PrefixSource(_message.Message):
    __slots__ = ("holder_id", "incarnation", "kv_address", "num_blocks", "tier")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    incarnation: str
    kv_address: str
    num_blocks: int
    tier: str
    def __init__(self, holder_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., kv_address: _Optional[str] = ..., num_blocks: _Optional[int] = ..., tier: _Optional[str] = ...) -> None: ...

class PrefillTarget(_message.Message):
    __slots__ = ("worker_id", "incarnation", "grpc_address", "kv_address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    grpc_address: str
    kv_address: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., grpc_address: _Optional[str] = ..., kv_address: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("handle", "reason")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: str
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class MoveRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class TokenLists(_message.Message):
    __slots__ = ("number", "sampling")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    number: int
    sampling: SamplingParams
    def __init__(self, number: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ...) -> None: ...

class ForgetLists(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class RedirectRequest(_message.Message):
    __slots__ = ("handle", "prefill_targets", "prefix_sources")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TARGETS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SOURCES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    prefill_targets: _containers.RepeatedCompositeFieldContainer[PrefillTarget]
    prefix_sources: _containers.RepeatedCompositeFieldContainer[PrefixSource]
    def __init__(self, handle: _Optional[int] = ..., prefill_targets: _Optional[_Iterable[_Union[PrefillTarget, _Mapping]]] = ..., prefix_sources: _Optional[_Iterable[_Union[PrefixSource, _Mapping]]] = ...) -> None: ...

class Budgets(_message.Message):
    __slots__ = ("role", "tpot_s", "prompt_tokens")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    role: str
    tpot_s: float
    prompt_tokens: int
    def __init__(self, role: _Optional[str] = ..., tpot_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "generate", "abort", "move", "lists", "forget", "redirect", "budgets")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    LISTS_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    generate: GenerateRequest
    abort: AbortRequest
    move: MoveRequest
    lists: TokenLists
    forget: ForgetLists
    redirect: RedirectRequest
    budgets: Budgets
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., generate: _Optional[_Union[GenerateRequest, _Mapping]] = ..., abort: _Optional[_Union[AbortRequest, _Mapping]] = ..., move: _Optional[_Union[MoveRequest, _Mapping]] = ..., lists: _Optional[_Union[TokenLists, _Mapping]] = ..., forget: _Optional[_Union[ForgetLists, _Mapping]] = ..., redirect: _Optional[_Union[RedirectRequest, _Mapping]] = ..., budgets: _Optional[_Union[Budgets, _Mapping]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("handle", "token_ids", "logprobs", "finish_reason", "stop_token_id", "error", "prompt_logprobs", "usage", "stamps", "move")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    STAMPS_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    finish_reason: FinishReason
    stop_token_id: int
    error: Error
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    usage: Usage
    stamps: _containers.RepeatedCompositeFieldContainer[Stamp]
    move: Move
    def __init__(self, handle: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., stamps: _Optional[_Iterable[_Union[Stamp, _Mapping]]] = ..., move: _Optional[_Union[Move, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_generated_tokens", "num_cached_tokens", "num_transferred_blocks", "num_transferred_bytes", "prefilled_locally", "prefill_worker_id", "num_recomputes", "fetched", "prefill_rates", "moved", "first_token_equal", "num_redirects")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERRED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_LOCALLY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RATES_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_EQUAL_FIELD_NUMBER: _ClassVar[int]
    NUM_REDIRECTS_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_transferred_blocks: int
    num_transferred_bytes: int
    prefilled_locally: bool
    prefill_worker_id: str
    num_recomputes: int
    fetched: _containers.RepeatedCompositeFieldContainer[FetchedPrefix]
    prefill_rates: Rates
    moved: FetchedPrefix
    first_token_equal: bool
    num_redirects: int
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_transferred_blocks: _Optional[int] = ..., num_transferred_bytes: _Optional[int] = ..., prefilled_locally: _Optional[bool] = ..., prefill_worker_id: _Optional[str] = ..., num_recomputes: _Optional[int] = ..., fetched: _Optional[_Iterable[_Union[FetchedPrefix, _Mapping]]] = ..., prefill_rates: _Optional[_Union[Rates, _Mapping]] = ..., moved: _Optional[_Union[FetchedPrefix, _Mapping]] = ..., first_token_equal: _Optional[bool] = ..., num_redirects: _Optional[int] = ...) -> None: ...

class FetchedPrefix(_message.Message):
    __slots__ = ("holder_id", "tier", "lane", "num_blocks", "num_bytes", "seconds")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    tier: str
    lane: str
    num_blocks: int
    num_bytes: int
    seconds: float
    def __init__(self, holder_id: _Optional[str] = ..., tier: _Optional[str] = ..., lane: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Rates(_message.Message):
    __slots__ = ("base_s", "prompt_token_s", "prompt_pair_s", "running_s", "context_token_s", "fetch_latency_s", "fetch_device_s", "fetch_host_s", "fetch_store_s", "fetch_disk_s", "spread", "num_steps", "num_fetches")
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PAIR_S_FIELD_NUMBER: _ClassVar[int]
    RUNNING_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_DEVICE_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_HOST_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_STORE_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_DISK_S_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_FETCHES_FIELD_NUMBER: _ClassVar[int]
    base_s: float
    prompt_token_s: float
    prompt_pair_s: float
    running_s: float
    context_token_s: float
    fetch_latency_s: float
    fetch_device_s: float
    fetch_host_s: float
    fetch_store_s: float
    fetch_disk_s: float
    spread: float
    num_steps: float
    num_fetches: float
    def __init__(self, base_s: _Optional[float] = ..., prompt_token_s: _Optional[float] = ..., prompt_pair_s: _Optional[float] = ..., running_s: _Optional[float] = ..., context_token_s: _Optional[float] = ..., fetch_latency_s: _Optional[float] = ..., fetch_device_s: _Optional[float] = ..., fetch_host_s: _Optional[float] = ..., fetch_store_s: _Optional[float] = ..., fetch_disk_s: _Optional[float] = ..., spread: _Optional[float] = ..., num_steps: _Optional[float] = ..., num_fetches: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_free_blocks", "num_blocks", "num_waiting_tokens", "draining", "rates", "budgets", "num_context_tokens")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_waiting_tokens: int
    draining: bool
    rates: Rates
    budgets: Budgets
    num_context_tokens: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., draining: _Optional[bool] = ..., rates: _Optional[_Union[Rates, _Mapping]] = ..., budgets: _Optional[_Union[Budgets, _Mapping]] = ..., num_context_tokens: _Optional[int] = ...) -> None: ...

class SessionFrame(_message.Message):
    __slots__ = ("outputs", "load", "incarnation", "handles", "token_ids", "heartbeat_s", "stuck", "features")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    STUCK_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    load: Load
    incarnation: str
    handles: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    heartbeat_s: float
    stuck: str
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., incarnation: _Optional[str] = ..., handles: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., heartbeat_s: _Optional[float] = ..., stuck: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "transfer_id", "reader_peer_id", "prompt_token_ids", "sampling", "priority", "cache_salt", "prefix_sources", "prompt_hashes", "resumed_token_ids", "timeout_s", "adapter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    READER_PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SOURCES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASHES_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: bytes
    reader_peer_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    priority: int
    cache_salt: str
    prefix_sources: _containers.RepeatedCompositeFieldContainer[PrefixSource]
    prompt_hashes: PromptHashes
    resumed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    timeout_s: float
    adapter: str
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[bytes] = ..., reader_peer_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., prefix_sources: _Optional[_Iterable[_Union[PrefixSource, _Mapping]]] = ..., prompt_hashes: _Optional[_Union[PromptHashes, _Mapping]] = ..., resumed_token_ids: _Optional[_Iterable[int]] = ..., timeout_s: _Optional[float] = ..., adapter: _Optional[str] = ...) -> None: ...

class PrefillScheduled(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("token_id", "logprobs", "finish_reason", "stop_token_id", "prompt_logprobs", "num_cached_tokens", "stamps", "rates", "fetched", "num_resumed_tokens")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAMPS_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    NUM_RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: PositionLogprobs
    finish_reason: FinishReason
    stop_token_id: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    num_cached_tokens: int
    stamps: _containers.RepeatedCompositeFieldContainer[Stamp]
    rates: Rates
    fetched: _containers.RepeatedCompositeFieldContainer[FetchedPrefix]
    num_resumed_tokens: int
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[PositionLogprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., num_cached_tokens: _Optional[int] = ..., stamps: _Optional[_Iterable[_Union[Stamp, _Mapping]]] = ..., rates: _Optional[_Union[Rates, _Mapping]] = ..., fetched: _Optional[_Iterable[_Union[FetchedPrefix, _Mapping]]] = ..., num_resumed_tokens: _Optional[int] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("scheduled", "finished", "failed")
    SCHEDULED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    scheduled: PrefillScheduled
    finished: PrefillFinished
    failed: Error
    def __init__(self, scheduled: _Optional[_Union[PrefillScheduled, _Mapping]] = ..., finished: _Optional[_Union[PrefillFinished, _Mapping]] = ..., failed: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("nonce", "key_ids", "address")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    KEY_IDS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    key_ids: _containers.RepeatedScalarFieldContainer[bytes]
    address: str
    def __init__(self, nonce: _Optional[bytes] = ..., key_ids: _Optional[_Iterable[bytes]] = ..., address: _Optional[str] = ...) -> None: ...

class IntroductionReply(_message.Message):
    __slots__ = ("nonce", "key_ids", "proof")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    KEY_IDS_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    key_ids: _containers.RepeatedScalarFieldContainer[bytes]
    proof: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., key_ids: _Optional[_Iterable[bytes]] = ..., proof: _Optional[bytes] = ...) -> None: ...
