"""A judge for tests: a real HTTP server that does to each request what a script says."""
import contextlib
import gzip
import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

SYNONYMS = {frozenset(pair) for pair in (
    ("heart attack", "myocardial infarction"), ("hypertension", "high blood pressure"),
    ("mri", "magnetic resonance imaging"), ("collapsed lung", "pneumothorax"))}


def knows(question, truth, answer):
    """The rule of a good judge, for what it knows."""
    truth, answer = truth.lower(), answer.lower()
    return "YES" if truth == answer or frozenset((truth, answer)) in SYNONYMS else "NO"


def completion(text):
    """What an OpenAI-compatible server sends when its model says text."""
    return json.dumps({"id": "1", "object": "chat.completion", "model": "judge", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})


def read_prompt(body):
    """The record {question, truth, answer} of a request, and the prompt around it."""
    [message] = body["messages"]
    text = message["content"]
    first, last = text.index("{"), text.rindex("}") + 1
    return json.loads(text[first:last]), (message["role"], text[:first], text[last:])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        with self.server.state.lock:
            self.server.state.connections += 1

    def log_message(self, *args):
        pass

    def do_POST(self):
        state, now = self.server.state, time.monotonic()
        if state.over.is_set():  # a connection that was kept alive must not outlive the server
            self.close_connection = True
            return
        text = self.rfile.read(length := int(self.headers["Content-Length"]))
        if len(text) < length:  # the client was killed
            self.close_connection = True
            return
        body = json.loads(text)
        record, around = read_prompt(body)
        request = SimpleNamespace(path=self.path, headers=dict(self.headers), body=body, time=now,
                                  around=around, **record)
        with state.lock:
            state.requests.append(request)
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
            what = state.script(request) if callable(state.script) else next(state.script, "ok")
        time.sleep(state.delay(request) if callable(state.delay) else state.delay)
        try:
            self.act(what, request)
        except (BrokenPipeError, ConnectionResetError):  # the client has lost patience
            self.close_connection = True
        finally:
            with state.lock:
                state.at_once -= 1

    do_GET = do_PUT = do_POST

    def act(self, what, request):
        """what: a behaviour below, a status, or say:TEXT, a completion with that text."""
        state = self.server.state
        what, _, detail = str(what).partition(":")
        verdict = completion(state.rule(request.question, request.truth, request.answer))
        if what == "ok":
            self.send(200, verdict)
        elif what == "say":
            self.send(200, completion(detail))
        elif what == "reply":
            self.send(200, detail)
        elif what.isdecimal():
            wish = {"Retry-After": detail} if detail else {}
            key = self.headers.get("Authorization", "none")  # some servers do show it
            self.send(int(what), json.dumps({"error": {"message": f"no, {key}"}}), **wish)
        elif what == "html":
            self.send(200, "<html>\n<body>Welcome</body>\n</html>", kind="text/html")
        elif what == "redirect":
            self.send(307, "", Location=detail)
        elif what == "huge":
            self.send(200, completion("YES") + " " * 10_000_000)
        elif what == "gzip":
            self.send(200, gzip.compress(verdict.encode()), **{"Content-Encoding": "gzip"})
        elif what == "chunked":
            parts = verdict[:9].encode(), verdict[9:].encode(), b""
            self.send(200, b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts),
                      **{"Transfer-Encoding": "chunked"})
        else:
            self.close_connection = True
            if what == "hang":
                state.over.wait(60)
            elif what == "trickle":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
                while not state.over.wait(0.02):
                    self.wfile.write(b" ")
            elif what == "garbage":
                self.wfile.write(b"220 mail server ready\r\n\r\n")
            elif what == "cut":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
                self.wfile.write(verdict.encode())
            else:
                assert what == "drop", f"there is no behaviour {what!r}"

    def send(self, status, content, kind="application/json", **headers):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        if "Transfer-Encoding" not in headers:
            headers["Content-Length"] = str(len(content))
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128


def free_port():
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def judge(*script, rule=knows, delay=0.0, port=0):
    """A running judge: its url, and what it has seen: requests, connections, most_at_once.

    script: behaviours of the first requests, "ok" thereafter; server.script may be set later on,
    to an iterator or to a function of the request. rule(question, truth, answer) -> what "ok" says.
    delay: seconds before each reply, or a function of the request."""
    server = Server(("127.0.0.1", port), Handler)
    server.state = state = SimpleNamespace(
        url=f"http://127.0.0.1:{server.server_port}/v1", port=server.server_port,
        script=iter(script), rule=rule, delay=delay, requests=[], connections=0, at_once=0,
        most_at_once=0, lock=threading.Lock(), over=threading.Event())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def always(what):
    """A script that does the same to every request."""
    return itertools.repeat(what)
