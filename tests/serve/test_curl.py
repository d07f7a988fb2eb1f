"""The curl examples of docs/serve.md, on a server that runs."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
EXAMPLES = [
    block.replace("\\\n", " ")
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    if block.startswith("curl ")
]


def test_there_are_some():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_is_answered(server, example):
    words = shlex.split(example.replace("http://127.0.0.1:8000", server.url))
    done = subprocess.run([*words, "--silent", "--fail-with-body", "--max-time", "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    if "--no-buffer" in words:
        *events, last = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
        assert last == "[DONE]"
        assert json.loads(events[-1])["usage"]["mean_steps"] > 0
    else:
        answer = json.loads(done.stdout)
        assert "error" not in answer
        for choice in answer.get("choices", []):
            assert choice["steps"]
