"""Headless Chromium over its debugging pipe: pages are opened, measured and clicked."""

import contextlib
import json
import os
import shutil
import subprocess
from functools import partial

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")


@contextlib.contextmanager
def browser(profile):
    """Start one; yields visit(path, width) -> evaluate(JavaScript)."""
    ours, its = os.pipe(), os.pipe()  # what we write to it, what it writes to us
    command = (f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --remote-debugging-pipe "
               f"--user-data-dir={profile} 30<&{ours[0]} 31>&{its[1]} 3<&30 4>&31")
    process = subprocess.Popen(["bash", "-c", command], pass_fds=(ours[0], its[1]),
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(ours[0])
    os.close(its[1])
    reader, writer = os.fdopen(its[0], "rb"), os.fdopen(ours[1], "wb")
    try:
        yield partial(visit, *protocol(reader, writer))
    finally:
        process.kill()
        process.wait()
        reader.close()
        with contextlib.suppress(BrokenPipeError):
            writer.close()


def protocol(reader, writer):
    """-> call(method, session, parameters), receive() and the events that came in between."""
    events, sent = [], []

    def receive():
        message = b""
        while not message.endswith(b"\0"):
            byte = reader.read(1)
            assert byte, "Chromium has ended"
            message += byte
        return json.loads(message[:-1])

    def call(method, session=None, **params):
        sent.append(method)
        message = {"id": len(sent), "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        writer.write(json.dumps(message).encode() + b"\0")
        writer.flush()
        while (reply := receive()).get("id") != len(sent):
            events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    return call, receive, events


def visit(call, receive, events, path, width, height=900):
    """Open a file in a window of some pixels' width; returns evaluate(JavaScript).
    Fails if the page's own script does."""
    target = call("Target.createTarget", url="about:blank")["targetId"]
    session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    call("Emulation.setDeviceMetricsOverride", session, width=width, height=height,
         deviceScaleFactor=1, mobile=width < 600)
    call("Page.enable", session)
    call("Runtime.enable", session)
    events.clear()
    call("Page.navigate", session, url=path.resolve().as_uri())
    while not any(event.get("method") == "Page.loadEventFired" for event in events):
        events.append(receive())
    thrown = [event for event in events if event.get("method") == "Runtime.exceptionThrown"]
    assert not thrown, thrown

    def evaluate(script):
        result = call("Runtime.evaluate", session, expression=script, returnByValue=True,
                      awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    return evaluate
