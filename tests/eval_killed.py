"""eval.py in processes that die by SIGKILL in the middle of one of its functions.

They are forked from this one, which has imported eval.py: that takes longer than most stages. A
line on stdin asks for one: {"function": of eval.py, "at": before which line it is killed, counted
as they are run, 0 for never, "count": which lines count, "own" ones of the function, "all", with
what it calls in eval.py and common.py, or "new", those when they run for the first time,
"arguments": of eval.py}. A line on stdout answers: the number of lines, "killed", or why it has
stopped otherwise.
"""
import json
import os
import signal
import sys
import traceback

import common
import eval as evaluation


def work(function, at, count, arguments):
    """-> how many lines the function's first call takes; or dies before the at-th."""
    original, ran, known = getattr(evaluation, function), 0, set()
    files = (evaluation.__file__, common.__file__)

    def step(frame, event, arg):
        nonlocal ran
        line = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not (count == "new" and line in known):
            known.add(line)
            ran += 1
            if ran == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return step

    def begin(frame, event, arg):  # of each function that is called; None: its lines do not count
        code = frame.f_code
        inside = code.co_filename in files if count != "own" else code is original.__code__
        return step if inside else None

    def traced(run):
        setattr(evaluation, function, original)
        sys.settrace(begin)
        original(run)
        sys.settrace(None)

    setattr(evaluation, function, traced)
    evaluation.STAGES |= {name: traced for name in evaluation.STAGES if name == function}
    sys.argv[1:] = arguments
    evaluation.main()
    return ran


def main():
    for job in map(json.loads, sys.stdin):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # our stdout is for answers
            try:
                said = work(**job)
            except BaseException:
                said = traceback.format_exc()
            os.write(writer, json.dumps(said).encode())
            os._exit(0)  # what else there is to do is the parent's
        os.close(writer)
        with open(reader) as file:
            said = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps("killed") if code == -signal.SIGKILL else said, flush=True)


if __name__ == "__main__":
    main()
