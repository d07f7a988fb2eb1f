"""Everything at once against a server: right requests, wrong ones, and clients that leave, stall or send too much.

    python tests/support/chaos.py http://127.0.0.1:8000 --requests 2000 --pid PID

The server needs the rules kl and latent_diff and a model whose bytes are tokens. Nobody else may use it meanwhile.
"""

import argparse
import asyncio
import collections
import json
import random
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

KINDS = [
    {"exit": "kl"}, {"exit": "kl", "threshold": 0.3}, {"exit": "latent_diff", "threshold": 0.4}, {"exit": "none"},
    {"exit": "none", "num_steps": 2}, {"exit": "latent_diff", "min_steps": 3},
]  # fmt: skip
RIGHT = [{"prompt": "ab" * (1 + i % 4), "seed": i, "max_tokens": 1 + i % 9, **KINDS[i % 6]} for i in range(24)]
WRONG = [
    {"temperature": 7}, {"prompt": []}, {"max_tokens": 99}, {"exit": "soon"}, {"model": "other"}, {"n": 0},
    {"prompt": "a" * 500}, {"stop": [""]}, {"logit_bias": {"x": 1}}, {"tools": [{}]},
]  # fmt: skip
BODIES = [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": NaN', b'{"prompt": ' + b"[" * 5000, b"a" * (2**20 + 1)]
STAY = ("ask", "stream", "wrong", "malformed", "slow")


class Chaos:
    """So many clients at once, each doing something at random; what became of them is counted in `seen`."""

    def __init__(self, url, clients=24, seed=0):
        self.url, self.clients, self.chance = url, clients, random.Random(seed)
        self.seen = collections.Counter()
        self.tokens = self.sent = 0  # tokens that were read, and requests that the server must have counted

    async def run(self, requests):
        """Raises AssertionError at the first thing that is wrong."""
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=self.clients)) as self.http:
            self.expected = [await self.ask(body) for body in RIGHT]
            left = iter(range(requests))

            async def client():
                for i in left:
                    what = "leave" if i % 5 == 0 else self.chance.choice(STAY)
                    await getattr(self, what)(self.chance.randrange(len(RIGHT)))
                    self.seen[what] += 1

            await asyncio.gather(*(client() for _ in range(self.clients)))
            for body, expected in zip(RIGHT, self.expected, strict=True):  # every lane still does what it did
                assert await self.ask(body) == expected

    async def post(self, path="completions", **given):
        while True:
            response = await self.http.post(f"{self.url}/v1/{path}", **given)
            self.sent += 1
            if response.status_code != 429:
                return response
            self.seen["429"] += 1
            assert response.headers["Retry-After"]
            await asyncio.sleep(0.01)

    async def ask(self, which):
        body = RIGHT[which] if isinstance(which, int) else which
        response = await self.post(json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        self.tokens += answer["usage"]["completion_tokens"]
        (choice,) = answer["choices"]
        if isinstance(which, int):
            self.check(which, choice)
        return choice

    def check(self, which, choice):
        assert choice == self.expected[which], (choice, self.expected[which])

    async def stream(self, which):
        response = await self.post(json=RIGHT[which] | {"stream": True})
        assert response.status_code == 200, response.text
        self.joined(which, [line[6:] for line in response.text.splitlines() if line.startswith("data: ")])

    def joined(self, which, events):
        """A stream's events say what the whole answer says."""
        *chunks, done = events
        assert done == "[DONE]", events
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
        choice = choices[-1] | {
            "text": "".join(c["text"] for c in choices), "steps": [r for c in choices for r in c["steps"]]
        }  # fmt: skip
        self.tokens += len(choice["steps"])
        self.check(which, choice)

    async def wrong(self, which):
        response = await self.post(json=RIGHT[which] | self.chance.choice(WRONG))
        assert response.status_code in (400, 404), response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    async def malformed(self, which):
        content = self.chance.choice(BODIES)
        headers = {"Content-Type": self.chance.choice(["application/json", "text/plain"])}
        response = await self.post(content=content, headers=headers)
        assert response.status_code == (413 if len(content) > 2**20 else 400), response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    async def open(self, which, share=1.0):
        """A connection over which that share of a streamed request has been sent."""
        where = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        body = json.dumps(RIGHT[which] | {"stream": True, "max_tokens": 20}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        data = f"{head}{len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        writer.write(data[: max(int(share * len(data)), 1)])
        await writer.drain()
        return reader, writer

    async def leave(self, which):
        """Hang up: in the midst of the request, at once, or after some of the answer."""
        moment = self.chance.randrange(4)
        reader, writer = await self.open(which, share=self.chance.random() if moment == 0 else 1.0)
        if moment == 2:
            await asyncio.sleep(self.chance.random() * 0.1)
        for _ in range(self.chance.randrange(1, 30) if moment == 3 else 0):
            await reader.readline()
        writer.transport.abort()  # a reset, as when a process dies

    async def slow(self, which):
        """Read a few bytes at a time, and get everything all the same."""
        reader, writer = await self.open(which)
        data = b""
        while part := await reader.read(self.chance.randrange(50, 400)):
            data += part
            await asyncio.sleep(0.01)
        writer.close()
        self.sent += 1
        if b" 429 " in data[:20]:
            self.seen["429"] += 1
            return
        events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
        assert events[-1:] == ["[DONE]"], data
        steps = [r for event in events[:-1] for r in json.loads(event)["choices"][0]["steps"]]
        self.tokens += len(steps)
        # The first tokens do not depend on how many may follow.
        both = min(len(steps), len(self.expected[which]["steps"]))
        assert steps[:both] == self.expected[which]["steps"][:both]


def numbers(url):
    """The counters of the server, summed over their labels, and those of HTTP by status."""
    found = collections.Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            name = sample.name.removeprefix("rdlm:")
            found[name] += sample.value
            if name == "http_requests_total" and sample.labels["path"] == "/v1/completions":
                found[sample.labels["status"]] += sample.value
    return found


def attack(url, requests, seed=0):
    """Run it and check that the server's own figures add up; returns what happened."""
    chaos, before = Chaos(url, seed=seed), numbers(url)
    asyncio.run(chaos.run(requests))
    end = time.monotonic() + 60
    while (after := numbers(url))["num_requests_running"] or after["num_requests_waiting"]:
        assert time.monotonic() < end, "requests are left over"
        time.sleep(0.05)
    grown = collections.Counter({name: after[name] - before[name] for name in after})
    ended = grown["request_success_total"]
    assert grown["e2e_request_latency_seconds_count"] >= ended
    assert grown["generation_tokens_total"] == grown["recurrences_per_token_count"] >= chaos.tokens
    assert grown["429"] == chaos.seen["429"]
    statuses = {name: int(value) for name, value in grown.items() if name.isdigit() and value}
    assert set(statuses) <= {"200", "400", "404", "413", "429", "499"}
    assert sum(statuses.values()) - statuses.get("499", 0) >= chaos.sent
    assert after["kv_cache_usage_perc"] == 0
    assert httpx.get(f"{url}/health").status_code == 200
    return {**chaos.seen, "statuses": statuses, "tokens": int(grown["generation_tokens_total"]), "answers": int(ended)}


def resident(pid):
    """MiB that a process holds in memory."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=4, help="parts, after each of which memory is printed")
    parser.add_argument("--pid", type=int, help="of the server")
    given = parser.parse_args()
    for turn in range(given.rounds):
        began = time.monotonic()
        print(attack(given.url, given.requests // given.rounds, seed=turn))
        memory = f", the server holds {resident(given.pid)} MiB" if given.pid else ""
        print(f"{time.monotonic() - began:.0f} s{memory}", flush=True)
