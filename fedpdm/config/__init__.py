"""Run configuration: frozen, typed, read from YAML, strict.

Every key has a type, a default and a check. Unknown keys and wrong types are refused with the
path of the key (`privacy.clipnorm: unknown key; did you mean clip_norm?`). It imports
`diffusion` at most. Science functions never see these classes; `fedpdm.setup` translates.
"""

from fedpdm.config.digests import config_digest, run_digest
from fedpdm.config.kind import RunKind
from fedpdm.config.reading import (
    apply_overrides,
    config_from_json,
    config_from_mapping,
    config_keys,
    config_reference,
    config_to_json,
    config_to_yaml,
    load_config,
    load_toy_config,
    own_code,
    read_policy,
    toy_config_from_mapping,
)
from fedpdm.config.schema import (
    AggregationConfig,
    CoarseConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    FineConfig,
    NetworkConfig,
    PartitionConfig,
    PrivacyConfig,
    RunConfig,
    RunSection,
    SamplingConfig,
    ScheduleConfig,
    StatisticsConfig,
    key,
)
from fedpdm.config.suite import Method, Profile, Suite, load_paper_values, load_suite
from fedpdm.config.toy import ToyConfig

__all__ = [
    "AggregationConfig",
    "CoarseConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "FineConfig",
    "Method",
    "NetworkConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "Profile",
    "RunConfig",
    "RunKind",
    "RunSection",
    "SamplingConfig",
    "ScheduleConfig",
    "StatisticsConfig",
    "Suite",
    "ToyConfig",
    "apply_overrides",
    "config_digest",
    "config_from_json",
    "config_from_mapping",
    "config_keys",
    "config_reference",
    "config_to_json",
    "config_to_yaml",
    "key",
    "load_config",
    "load_paper_values",
    "load_suite",
    "load_toy_config",
    "own_code",
    "read_policy",
    "run_digest",
    "toy_config_from_mapping",
]
