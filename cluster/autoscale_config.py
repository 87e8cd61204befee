"""The section `autoscale` of a deployment file."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from cluster.config_section import Section
from cluster.policy.judgement import Limits, ScaleSettings


class LimitsConfig(Section):
    """How many parts of a kind there may be. Default: as many as are configured."""

    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _min_is_no_more_than_max(self) -> "LimitsConfig":
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; min must not be more than max")
        return self


class AutoscaleConfig(Section):
    """When experts are placed anew, and parts are started or ended, by themselves.

    By default it decides and tells, and does nothing. With dry_run off, and no limits given, only experts move and get
    copies, within the slots of the shards that there are.

    paused: nothing by itself; `drover autoscale` changes it at run time. dry_run: decide and tell, and do nothing.
    metrics_interval_s: between two measurements. look_back_period_s: older ones count for nothing, and all stays.
    stable_window_s: decisions rest on the average of this time. panic_window_s: of this, in a panic.
    panic_threshold: a panic begins when the panic window asks for so many times what there is.
    upscale_delay_s, downscale_delay_s: for so long a change must have been asked for; in a panic, more come at once.
    upscaling_factor, downscaling_factor: the share of a wanted change that is made at once.
    cooldown_s: after a change of a kind, before the next. target_load: busy share that parts are to have.
    shards, routers, frontends: {min, max} of each.
    """

    paused: bool = False
    dry_run: bool = True
    metrics_interval_s: Annotated[float, Field(gt=0)] = ScaleSettings.metrics_interval_s
    look_back_period_s: Annotated[float, Field(gt=0)] = ScaleSettings.look_back_period_s
    stable_window_s: Annotated[float, Field(gt=0)] = ScaleSettings.stable_window_s
    panic_window_s: Annotated[float, Field(gt=0)] = ScaleSettings.panic_window_s
    panic_threshold: Annotated[float, Field(gt=1)] = ScaleSettings.panic_threshold
    upscale_delay_s: Annotated[float, Field(ge=0)] = ScaleSettings.upscale_delay_s
    downscale_delay_s: Annotated[float, Field(ge=0)] = ScaleSettings.downscale_delay_s
    upscaling_factor: Annotated[float, Field(gt=0)] = ScaleSettings.upscaling_factor
    downscaling_factor: Annotated[float, Field(gt=0)] = ScaleSettings.downscaling_factor
    cooldown_s: Annotated[float, Field(ge=0)] = ScaleSettings.cooldown_s
    target_load: Annotated[float, Field(gt=0, le=1)] = ScaleSettings.target_load
    shards: LimitsConfig | None = None
    routers: LimitsConfig | None = None
    frontends: LimitsConfig | None = None

    @model_validator(mode="after")
    def _windows_hold_measurements(self) -> "AutoscaleConfig":
        longer = (
            ("panic_window_s", "metrics_interval_s"),
            ("look_back_period_s", "metrics_interval_s"),
            ("stable_window_s", "panic_window_s"),
        )
        for long, short in longer:
            if getattr(self, long) < getattr(self, short):
                raise ValueError(
                    f"{long} is {getattr(self, long):g}; it must be at least {short} ({getattr(self, short):g})"
                )
        return self

    def settings(self, shards: int, routers: int, frontends: int) -> ScaleSettings:
        """shards, routers, frontends: how many are configured."""
        counts = {"shards": shards, "routers": routers, "frontends": frontends}
        told: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields if name not in counts}
        given = {name: getattr(self, name) for name in counts}
        limits = {
            name: Limits(count, count) if given[name] is None else Limits(given[name].min, given[name].max)
            for name, count in counts.items()
        }
        return ScaleSettings(**told | limits)
