"""What is told about the served model, and how it samples by default."""

from dataclasses import asdict, dataclass, replace

from checkpoint.config import ModelConfig
from checkpoint.layout import count_parameters
from router.request import DEFAULT_MAX_TOKENS, SamplingParams

# For what generation_config.json does not name.
DEFAULT_SAMPLING = SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)


@dataclass(frozen=True)
class ModelCard:
    """The model's name, size and dtype. Its tokenizer and the router's limits tell the rest.

    default_sampling: for the fields that a request leaves out. Its seed is not used: every request
    draws one. default_stop: stop strings for requests without any.
    """

    name: str
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    total_parameters: int
    active_parameters: int
    dtype: str
    default_sampling: SamplingParams = DEFAULT_SAMPLING
    default_stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, config: ModelConfig, dtype: str) -> "ModelCard":
        """The card of a checkpoint that is served under `name` in `dtype`."""
        total, active = count_parameters(config)
        given = {name: value for name, value in asdict(config.sampling_defaults).items() if value is not None}
        stop = given.pop("stop")
        return cls(
            name=name,
            eos_token_ids=config.eos_token_ids,
            num_layers=config.num_layers,
            num_moe_layers=len(config.moe_layers),
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            total_parameters=total,
            active_parameters=active,
            dtype=dtype,
            default_sampling=replace(DEFAULT_SAMPLING, **given),
            default_stop=stop,
        )
