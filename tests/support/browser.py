"""A headless Chromium, driven over its debugging pipe: no package needed."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """A page in the browser."""

    def __init__(self, write, read):
        self._write, self._read, self._ids, self._session = write, read, itertools.count(1), None

    def call(self, method, **parameters):
        """A method of the DevTools protocol and its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = json.loads(b"".join(iter(lambda: self._read.read(1), b"\0")))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def attach(self, url):
        target = self.call("Target.createTarget", url=url)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def run(self, script):
        """The value of an expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition):
        """Wait until an expression is true, for at most a minute; until then it may fail."""
        end = time.monotonic() + 60
        while self.call("Runtime.evaluate", expression=f"!!({condition})")["result"].get("value") is not True:
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def click(self, selector):
        """With the mouse, in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text):
        self.call("Input.insertText", text=text)


@contextlib.contextmanager
def page(url, profile):
    """A page at `url`, in a browser with a profile in this folder."""
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    script = f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, CHROMIUM, *flags], pass_fds=(their_read, their_write), stderr=subprocess.DEVNULL
    )
    os.close(their_read)
    os.close(their_write)
    with os.fdopen(our_write, "wb") as write, os.fdopen(our_read, "rb") as read:
        try:
            opened = Page(write, read)
            opened.attach(url)
            yield opened
        finally:
            process.kill()
            process.wait()
