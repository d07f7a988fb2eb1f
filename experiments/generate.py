"""Continue a prompt with a trained run; every token takes as many recurrences as it needs.

    python experiments/generate.py runs/quickstart --prompt "Geography"
    python experiments/generate.py runs/quickstart --prompt "Geography" --exit none --steps 8
    python experiments/generate.py runs/quickstart --prompt "Geography" --exit latent_diff --temperature 0.7 --seed 1
    python experiments/generate.py runs/quickstart --prompt "Geography" --exit kl --calibrated
    python experiments/generate.py runs/quickstart --prompt "Geography" --exit latent_diff --parallel.window 16
    python experiments/generate.py runs/huginn --chat --prompt "Who are you?" --stop "Who"

Text appears as it is made. Then every token is shown with the recurrences it took: coloured on a terminal, as a list
of TOKEN/RECURRENCES elsewhere. Exit codes: 0 done, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rdlm.config import CachePolicy, ExitName, InputError, Parallel, Sampling, check_threshold, require
from rdlm.runtime import parse_arguments, run_command

if TYPE_CHECKING:
    import numpy as np

    from rdlm.decode import Generation
    from rdlm.tokenizer import DecodeStream, Tokenizer

# Backgrounds from few to many recurrences: one hue, darker is deeper, readable in grey and with any colour vision.
SHADES = ("#fff7ec", "#fee8c8", "#fdd49e", "#fdbb84", "#fc8d59", "#ef6548", "#d7301f", "#990000")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PICTURES = {chr(c): chr(0x2400 + c) for c in range(32)} | {"\x7f": "\u2421"}
DARK = 5  # shades from here on carry white text


@dataclasses.dataclass(frozen=True)
class Window:
    """Refine several tokens together (docs/parallel.md)."""

    window: int | None = None
    """Unfinished positions that are refined together; None: one token after the other."""
    inner: int = 4
    """Recurrences after which all of them are guessed again, and the exit rule is asked."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Continue a prompt with the run in RUN_DIR."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run folder, made by train.py or convert_huggingface.py."""
    prompt: str
    """Text to continue; may be empty."""
    chat: bool = False
    """Reply to the prompt as a message of a user, in the tokenizer's chat template."""
    prefix: bool = False
    """Let the tokens of the prompt see each other in both directions; only models with prefix_attention."""
    max_new_tokens: int = 64
    """Maximum number of new tokens.

    What ends a text stops earlier: the end token, the end of a turn in the chat template, and the eos_token_id of
    generation_config.json."""
    stop: tuple[str, ...] = ()
    """Texts, or names of special tokens, before which generation stops."""
    steps: int | None = None
    """Recurrences per token; the maximum, with an exit rule.

    None: mean_recurrence of the model with --exit none, twice that otherwise, about as deep as training went; 1 for a
    model that was trained with 1."""
    exit: Literal["none"] | ExitName = "kl"
    """When a token stops before --steps.

    kl, min_p_kl, entropy_diff: its prediction hardly changes from one recurrence to the next. gated_kl: kl, checked
    only once the state moves little.

    latent_diff, cosine: its state hardly changes. argmax_stability: its likeliest next token stays the same."""
    threshold: float | None = None
    """Threshold of the exit rule: larger stops earlier, except that argmax_stability counts recurrences.

    None: kl and gated_kl 5e-4, min_p_kl 1e-5, entropy_diff 1e-3, latent_diff 0.03, cosine 1e-3, argmax_stability 5."""
    calibrated: bool = False
    """Take threshold and --steps from calibrate_exits.py, which promise agreement with full depth."""
    min_steps: int = 0
    """The exit rule is first checked after this many recurrences plus one."""
    temperature: float = 0.0
    """0 takes the likeliest token; larger is more varied."""
    top_k: int = 0
    """Sample among the K likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that already occurred; 1 is off."""
    cache_dtype: Literal["int8"] | None = None
    """int8: round keys and values to 8 bits (docs/quantize.md). None: keep them as they are computed."""
    parallel: Window = Window()
    ema: bool = False
    """Use the moving average of the weights, if the run kept one (optimizer.ema_decay)."""
    tensor: int = 1
    """Devices that share the model, each with some of its heads and columns."""
    seed: int = 0
    """Of the initial states and of sampling."""
    show_steps: bool = True
    """Show the recurrences that every token took."""


def main() -> int:
    args = parse_arguments(Args, prog="generate.py", description=__doc__)
    require(args.max_new_tokens >= 1, "--max-new-tokens", args.max_new_tokens, "must be at least 1")
    require(args.steps is None or args.steps >= 1, "--steps", args.steps, "must be at least 1")
    require(0 <= args.seed < 2**31, "--seed", args.seed, "must be in [0, 2**31)")
    check_threshold(args.exit, args.threshold)
    if args.calibrated:
        check_calibrated(args)
    import jax  # takes seconds, so only now

    from rdlm import exits
    from rdlm.evaluation.calibration import load
    from rdlm.run import find

    run = find(args.run_dir, ema=args.ema, tensor=args.tensor)
    tokenizer = run.require_tokenizer()
    if args.calibrated:
        found = load(args.run_dir, args.exit, run.step, f"python experiments/calibrate_exits.py {args.run_dir}")
        args = dataclasses.replace(args, threshold=found.threshold, steps=found.goal.num_steps)
        print(f"calibrated: {found.guarantee}", file=sys.stderr)
    rule = exits.named(args.exit, args.threshold)
    trained = run.config.mean_recurrence
    looped = trained == 1 or run.config.loop.close  # made for exactly so many
    max_steps = args.steps or (trained if rule is None or looped else 2 * trained)
    chat = [{"role": "user", "content": args.prompt}]
    before = tokenizer.encode_chat(chat) if args.chat else tokenizer.encode(args.prompt)
    words = [s for s in args.stop if s not in tokenizer.special_ids]
    with Stream(tokenizer.decode_stream(after=before, stop=words), args.prompt + "\n" * args.chat) as stream:
        out = run.generate(
            chat if args.chat else args.prompt,
            max_new_tokens=args.max_new_tokens,
            num_steps=max_steps,
            exit_rule=rule,
            min_steps=args.min_steps,
            sampling=sampling(args),
            stop=args.stop,
            prefix=args.prefix,
            cache=CachePolicy(dtype=args.cache_dtype),
            parallel=parallel(args),
            key=jax.random.key(args.seed),
            on_token=stream.token,
        )
    if args.show_steps:
        show_steps(tokenizer, before, out)
    summary(out, args, max_steps, stream.rate)
    return 0


def check_calibrated(args: Args) -> None:
    """Refuse what a calibrated threshold promises nothing about."""
    if args.exit == "none":
        raise InputError("--calibrated: --exit none has no threshold; name a rule, such as --exit kl")
    given = {
        "--threshold": args.threshold,
        "--steps": args.steps,
        "--min-steps": args.min_steps or None,
        "--parallel.window": args.parallel.window,
    }
    for flag, value in given.items():
        if value is not None:
            raise InputError(f"{flag} {value:g}: --calibrated promises nothing about it; leave one of them out")


def parallel(args: Args) -> Parallel | None:
    """The window, if one was asked for."""
    chosen = args.parallel
    if chosen.window is None:
        require(chosen.inner == 4, "--parallel.inner", chosen.inner, "needs --parallel.window")
        return None
    never = 0.0 if args.exit == "none" else None  # without a rule, positions run all recurrences
    return Parallel(window=chosen.window, inner=chosen.inner, threshold=never)


def sampling(args: Args) -> Sampling:
    """How tokens are chosen."""
    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )


class Stream:
    """Prints the prompt and the tokens as they come, and measures their rate."""

    def __init__(self, decoder: DecodeStream, prompt: str) -> None:
        """Nothing is printed before the first token; a terminal shows that something is going on."""
        from rich.console import Console

        self.decoder, self.prompt = decoder, prompt
        self.times: list[float] = []
        self.status = Console(stderr=True).status("compiling")

    def __enter__(self) -> Stream:
        self.status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.status.stop()
        if self.times:
            print(visible(self.decoder.end()), flush=True)

    def token(self, prompt: int, token: int, steps: int) -> None:
        """One more token."""
        del prompt, steps
        if not self.times:
            self.status.stop()
            print(visible(self.prompt), end="")
        self.times.append(time.perf_counter())
        print(visible(self.decoder.push(token)), end="", flush=True)

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first, so that neither the prompt nor compilation counts."""
        if len(self.times) < 3:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def visible(text: str) -> str:
    """For a terminal: control characters other than newline and tab as printable ones. Elsewhere: the text itself."""
    return CONTROL.sub(lambda c: PICTURES.get(c[0], f"\\x{ord(c[0]):02x}"), text) if sys.stdout.isatty() else text


def show_steps(tokenizer: Tokenizer, before: np.ndarray, out: Generation) -> None:
    """Every new token with its recurrences: shaded on a terminal, as TOKEN/RECURRENCES elsewhere."""
    from rich.console import Console
    from rich.text import Text

    tokens, steps = out.tokens[0].tolist(), out.steps[0].tolist()
    earlier = [[*before.tolist(), *tokens[:i]] for i in range(len(tokens))]
    pieces = [tokenizer.decode([t], skip_special=False, after=a) for t, a in zip(tokens, earlier, strict=True)]
    if not sys.stdout.isatty():
        print("\ntoken/recurrences:")
        line = ""
        for piece, r in zip(pieces, steps, strict=True):
            if len(line) > 100:
                print(line)
                line = ""
            line += f"  {piece!r}/{r}"
        print(line)
        return
    low, high = min(steps), max(steps)
    text = Text("\n")
    for piece, r in zip(pieces, steps, strict=True):
        text.append(visible(piece).replace("\n", "⏎\n"), style(r, low, high))
    text.append("\n\nrecurrences: ")
    for r in sorted(set(steps)):
        text.append(f" {r} ", style(r, low, high))
    Console(highlight=False).print(text)


def style(r: int, low: int, high: int) -> str:
    """Rich style for r recurrences between the minimum and the maximum that occurred."""
    shade = (r - low) * (len(SHADES) - 1) // max(high - low, 1)
    return f"{'#ffffff' if shade >= DARK else '#000000'} on {SHADES[shade]}"


def summary(out: Generation, args: Args, max_steps: int, rate: float | None) -> None:
    """One line of figures."""
    steps, before = out.steps[0], out.prompt_steps[0]
    line = f"{len(steps)} tokens, {steps.mean():.1f} recurrences on average"
    if args.exit != "none":
        line += f" ({steps.min()} to {steps.max()}, at most {max_steps}; prompt {before.mean():.1f}), exit {args.exit}"
    if out.parallel is not None:
        line += f"; {out.core_passes / len(steps):.1f} recurrences in sequence per token"
    if rate is not None:
        line += f"; {rate:.1f} tokens/s without compilation"
    print(line)


if __name__ == "__main__":
    run_command(main)
