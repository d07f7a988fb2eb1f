"""A peer of experiments/bench/peers.py that computes nothing: `python fake_peer.py rdlm|transformers THREADS`.

FAKE_PEER says what the one called transformers does: answers as the other, slowly; or differs in the result of that
name ("logits", "tokens", "near tokens", "steps", "loss"); or "dies" or "fails" when it is asked to train.
"""

import json
import os
import sys

NAME, THREADS = sys.argv[1:]
DOES = os.environ["FAKE_PEER"] if NAME == "transformers" else ""


def answer(do, tokens=(), new_tokens=0, adaptive=False, **given):
    if do == "train" and DOES == "dies":
        print("killed by the test", file=sys.stderr)
        sys.exit(7)
    if do == "train" and DOES == "fails":
        return {"error": "ValueError: no gradient"}
    made = [1] * new_tokens
    if DOES in ("tokens", "near tokens") and new_tokens > 1:
        made[1] = 0 if DOES == "tokens" else 2
    found = {
        "load": {"vocab": 8, "versions": "fake"},
        "logits": {"logits": [0.0, 4.0, 3.999, 1.0 + (DOES == "logits")]},
        "generate": {"tokens": made, "steps": [3 + (DOES == "steps")] * new_tokens if adaptive else []},
        "train": {"loss": 2.0 + (DOES == "loss")},
    }
    return found[do] | {"seconds": 0.3 if NAME == "transformers" else 0.1}


for line in sys.stdin:
    print(json.dumps(answer(**json.loads(line))), flush=True)
