"""How a server serves: sizes, limits, default depth."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from rdlm.config import ExitName, InputError, ModelConfig, check_threshold, local_path, require


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Options of a server. None: chosen from the model, by `resolved`.

    Raises:
      InputError: an impossible value.
    """

    model_name: str | None = None
    """Name of the model for clients; None: that of the folder."""
    lanes: int = 16
    """Requests in flight, for each kind of exit rule."""
    max_context: int | None = None
    """Tokens of prompt and answer together; None: the model's maximum, at most 2,048."""
    steps: int | None = None
    """Recurrences per token where a request does not say; the maximum, with an exit rule. None: as many as in training
    without a rule, and twice as many with one; always as in training where the model was made for exactly so many."""
    max_steps: int | None = None
    """Most recurrences that a request may ask for."""
    exit: tuple[Literal["none"] | ExitName, ...] | None = None
    """Exit rules that requests may choose; the first is the default. `none` can always be chosen."""
    threshold: float | None = None
    """Threshold of the default rule; None: the rule's own."""
    cache_recurrences: int | None = None
    """Recurrences whose keys and values are kept; None: all."""
    cache_dtype: Literal["int8"] | None = None
    """int8: keys and values are rounded to 8 bits (docs/quantize.md), and take about half the memory of bfloat16. None:
    they are kept as they are computed."""
    cache_tokens: int | None = None
    """Tokens of prompts and answers that are in the cache together, for each kind of exit rule; None: enough for every
    lane's --max-context."""
    prefill_chunk: int | None = None
    """Tokens of a long prompt that are read at once, between tokens of others; None: twice the lanes, but at least 32
    on a CPU and 128 elsewhere."""
    prompt_cache: float | None = None
    """GiB of keys and values, for each kind of exit rule, that are kept of long prompts for later ones that begin
    alike; 0: none. None: as much as an eighth of the lanes hold, and at least one lane, or nothing with
    --cache-recurrences."""
    max_queue: int = 64
    """Answers that may wait for a lane, for their first time or after they gave one up to others; more are refused with
    status 429."""
    max_priority: int = 0
    """Highest priority that a request may ask for, at most 100; lower ones are always allowed."""
    max_body: int = 2**20
    """Bytes of a request's body."""
    max_buffer: int = 1024
    """Tokens that a slow reader may fall behind before its request ends."""
    request_timeout: float = 600.0
    """Seconds that a request may take in all."""
    write_timeout: float = 30.0
    """Seconds that a client may take to accept what is sent."""
    grace: float = 30.0
    """Seconds that requests in flight may go on after a signal to stop."""
    api_key_file: Path | None = None
    """A file with one API key per line; clients send one as a bearer token."""
    refuse_unknown: bool = False
    """Refuse requests with fields that are not known, instead of ignoring these fields."""
    access_log: bool = True
    """Write one JSON line per request to stderr: no prompt, no answer."""

    def __post_init__(self) -> None:
        counts = ("lanes", "max_context", "steps", "max_steps", "cache_recurrences", "cache_tokens", "prefill_chunk")
        for name in (*counts, "max_queue", "max_body", "max_buffer"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "must be at least 1")
        require(0 <= self.max_priority <= 100, "--max-priority", self.max_priority, "must be in [0, 100]")
        for name in ("request_timeout", "write_timeout", "grace"):
            value = getattr(self, name)
            require(0 < value < 1e6, f"--{name.replace('_', '-')}", value, "must be a number of seconds above 0")
        room = self.prompt_cache
        require(room is None or 0 <= room < 1e6, "--prompt-cache", room, "must be a number of GiB, at least 0")
        if room and self.cache_recurrences is not None:
            raise InputError("--prompt-cache: cannot be combined with --cache-recurrences; leave one of them out")
        if self.exit is not None:
            require(len(self.exit) > 0, "--exit", self.exit, "name at least one rule, or leave it out")
            require(len(set(self.exit)) == len(self.exit), "--exit", self.exit, "names a rule twice")
        check_threshold(self.exit[0] if self.exit else "kl", self.threshold)

    def resolved(self, config: ModelConfig) -> ServeOptions:
        """These options with everything chosen that follows from the model.

        Raises:
          InputError: the model cannot do it.
        """
        trained = config.mean_recurrence
        rules = self.exit or (("none",) if trained == 1 else ("kl",))
        fixed = trained == 1 or config.loop.close  # made for exactly so many
        usual = trained if fixed else 2 * trained  # with a rule
        max_steps = self.max_steps or max(self.steps or 1, usual)
        steps = self.steps or min(usual, max_steps)
        require(steps <= max_steps, "--steps", steps, f"must be at most --max-steps {max_steps}")
        context = min(config.max_length, 2048) if self.max_context is None else self.max_context
        fits = 2 <= context <= config.max_length
        require(fits, "--max-context", context, f"must be from 2 to the model's maximum, {config.max_length}")
        held = self.cache_tokens
        require(held is None or held >= context, "--cache-tokens", held, f"must be at least --max-context {context}")
        if "gate" in rules and not config.loop.gate:
            raise InputError("--exit gate: this model has no exit gate; choose another rule")
        return dataclasses.replace(self, exit=rules, steps=steps, max_steps=max_steps, max_context=context)

    def read_keys(self) -> list[bytes]:
        """The API keys; none: everybody is served.

        Raises:
          InputError: the file cannot be read or holds no key.
        """
        if self.api_key_file is None:
            return []
        try:
            lines = local_path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {self.api_key_file}: cannot be read ({error})") from error
        keys = [line.strip().encode() for line in lines if line.strip()]
        require(bool(keys), "--api-key-file", str(self.api_key_file), "holds no key; write one per line")
        return keys
