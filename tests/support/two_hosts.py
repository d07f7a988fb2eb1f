"""Two processes of four CPU devices each, with one model: what each of them does, and how a test starts both.

python two_hosts.py FOLDER
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from compilation import QUICK

ROOT = Path(__file__).parents[2]
TOKENS, SIZE, CAPACITY = 32, 2, 16  # positions of all pages, of a page, and of a lane
SEED = 8  # of requests of which some are cancelled after some tokens, and one gives its lane to another
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [3]]


def start_both(command):
    """Both processes of a command; stdout and stderr of each are pipes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = QUICK | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "RDLM_COORDINATOR": address, "RDLM_PROCESSES": "2",
        "PYTHONPATH": ":".join(str(ROOT / place) for place in (".", "tests/support", "tests/decode")),
    }  # fmt: skip
    return [
        subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | shared | {"RDLM_PROCESS_ID": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip


def run_both(folder):
    """(exit codes, last lines of stderr, what each process found) of `main`."""
    both = start_both([sys.executable, __file__, folder])
    try:
        said = [process.communicate(timeout=600)[1].splitlines() for process in both]
    finally:
        for process in both:
            process.kill()
    files = [folder / f"{i}.json" for i in range(2)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return [process.returncode for process in both], [lines[-3:] for lines in said], found


def main():
    from rdlm.config import InputError
    from rdlm.runtime import is_first, start

    start("same")
    import engine_cases
    import jax
    from test_pages import KIND, load

    import rdlm
    from rdlm import exits
    from rdlm.decode.hosts import News
    from rdlm.runtime import memory

    params, config, mine, found = engine_cases.params(), engine_cases.TINY, jax.process_index(), {}

    def refused(call):
        try:
            call()
        except InputError as error:
            return str(error)
        return None

    def served(prompt_cache):
        small = {"page_size": SIZE, "cache_tokens": TOKENS, "capacity": CAPACITY}
        engine = engine_cases.new_engine(KIND, 4, 2, prefill_chunk=3, prompt_cache=prompt_cache, **small)
        if not is_first():
            found["submit"] = refused(lambda: engine.submit([1]))
            engine.follow()
            return None
        made = engine_cases.serve(KIND, load(SEED), engine)
        found["preempted"], found["ticks"] = engine.preempted, engine.usage.ticks
        found["constraint"] = refused(lambda: engine.submit([1], constraint=object()))
        engine.close()
        found["closed"] = refused(lambda: engine.submit([1]))
        return [(*engine_cases.outcome(s), s.cancelled) for s in made]

    def wrong(news):
        return news._replace(came=[(*c[:2], (c[2] + 1) % config.vocab_size, c[3]) for c in news.came])

    found["served"] = served(10**7)
    if mine:  # a control: the other host hears of other prompts
        heard = News.of
        News.of = lambda *given: wrong(heard(*given))
    found["control"] = served(0)
    held, wider = rdlm.tensor_parallel(params, config, 8)
    out = rdlm.generate(held, wider, PROMPTS, max_new_tokens=5, num_steps=4)
    found["generated"] = [[x.tolist() for x in part] for part in (out.tokens, out.steps)]

    def differ(prompts=((5, 6),), **options):
        return refused(lambda: rdlm.generate(held, wider, prompts, max_new_tokens=5, **options))

    found["differ"] = {
        "prompts": differ([[5, mine]]),
        "longer": differ([[5] * (3 + 20 * mine)]),
        "wrong": differ([[5] if mine else []]),
        "on_token": differ(on_token=(lambda *_: None) if mine else None),
        "exit_rule": differ(exit_rule=(exits.kl if mine else exits.latent_diff)(0.1)),
        "lanes": refused(lambda: rdlm.Engine(held, wider, lanes=2 + mine, max_new_tokens=2)),
    }
    found["devices"] = refused(lambda: rdlm.tensor_parallel(params, config, 2, 2))
    if mine:
        memory.free_memory = lambda: 0
    found["memory"] = refused(lambda: memory.require_memory("cache", 2**27, "use less", hosts=True))
    (Path(sys.argv[1]) / f"{mine}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    from rdlm.runtime import run_command

    run_command(main)
