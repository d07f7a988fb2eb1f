"""`experiments/serve.py` on two hosts, which are two processes here: the first one answers, and ends both."""

import signal
import socket
import sys
import time

import httpx
import pytest
from small_runs import saved
from two_hosts import ROOT, start_both

import rdlm
from rdlm.config import DataConfig
from rdlm.tokenizer import Tokenizer

ASK = {"prompt": "land 3", "max_tokens": 5, "temperature": 0, "return_token_ids": True}


def ready(url, both):
    end = time.monotonic() + 500
    while time.monotonic() < end and all(process.poll() is None for process in both):
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    return False


def post(url, **fields):
    return httpx.post(f"{url}/v1/completions", json=ASK | fields, timeout=300).json()


@pytest.mark.slow
def test_the_first_process_answers_and_ends_both(tmp_path):
    data = {"data": DataConfig(sequence_length=24, tokenizer_size=256)}
    folder = saved(tmp_path / "run", 320, data, Tokenizer.bytes_only())
    expected = rdlm.load(folder).generate(ASK["prompt"], max_new_tokens=5, num_steps=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{(port := free.getsockname()[1])}"
    sizes = {"tensor": 4, "data": 2, "lanes": 2, "max-context": 16, "max-steps": 2, "prompt-cache": 0}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", size)]
    command = [sys.executable, ROOT / "experiments/serve.py", folder, "--port", port, "--exit", "none", *flags]
    both = start_both(command)
    try:
        assert ready(url, both), [process.communicate(timeout=60) for process in both if process.poll() is not None]
        answer = post(url)["choices"][0]
        assert answer["token_ids"] == expected.tokens[0].tolist()
        assert answer["steps"] == [2] * 5
        (echo,) = post(url, echo=True, max_tokens=0, logprobs=1)["choices"]
        assert len(echo["logprobs"]["token_logprobs"]) == len(expected.prompt_steps[0])
        refused = post(url, response_format={"type": "json_object"})["error"]
        assert refused["message"] == "response_format: a model on several hosts serves none; leave it out"
        for process in both:  # the second one waits for the first
            process.send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=300)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    finally:
        for process in both:
            process.kill()
