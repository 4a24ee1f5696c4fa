"""A judge that takes conversations, for evaluation: 50 ms or what is asked for, on many connections
at once, in a process of its own so that its work is not the client's.

    python tests/eval_judge.py PORT SECONDS    # prints a line once it listens"""
import asyncio
import json
import sys

COMMON = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def record(messages):
    """The question, truth and answer that the first message holds."""
    text = messages[0]["content"]
    return json.loads(text[text.index("{"):text.rindex("}") + 1])


async def serve(reader, writer, seconds, reply):
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n")
                          if line.lower().startswith(b"content-length"))
            body = json.loads(await reader.readexactly(length))
            await asyncio.sleep(seconds)
            content = json.dumps({"choices": [{"message": {
                "role": "assistant", "content": reply(body)}}]}).encode()
            writer.write((COMMON % len(content)).encode() + content)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def yes_or_no(body):
    """NO to an answer that begins with `wrong`, later also to one that `changes its mind`; a digit
    where digits are asked for."""
    answer = record(body["messages"])["answer"]
    wrong = answer.startswith("wrong" if len(body["messages"]) == 1 else ("wrong", "changes"))
    if "0 to 5" in body["messages"][0]["content"]:
        return "1" if wrong else "4"
    return "NO" if wrong else "YES"


async def main(port, seconds):
    server = await asyncio.start_server(
        lambda reader, writer: serve(reader, writer, seconds, yes_or_no), "127.0.0.1", port,
        backlog=512)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
