"""reward.py: what each string earns, part by part, and that no string can crash or stall it."""
import json
import random
import re
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from scoring import score  # noqa: E402

import reward  # noqa: E402

DEFAULTS = {"judge": "exact", "judge_check": False, "embedder": "ngram", "embed_threshold": 0.8,
            "embed_soft": False, "weight_judge": 0.575, "weight_embed": 0.375,
            "weight_modality": 0.05, "weight_format": 0.1}


def load(**settings):
    return reward.load(SimpleNamespace(**(DEFAULTS | settings)))


REAL = ROOT / ".." / "shared" / "data" / "responses" / "medvlm_r1_real.jsonl"
X = "<X_RAY> left lung"  # the solution of most cases
T = "<thinking>a</thinking>"
GOOD = f"<X_RAY>{T}<answer>left lung</answer>"
LONG = "word " * 100  # 500 characters


@pytest.fixture(scope="module")
def scorer():
    return load()


# (what it is, solution, response, (judge, embed, modality, format))
CASES = [
    # right, and white space that does not matter
    ("all right", X, GOOD, (1, 1, 1, 1)),
    ("all right, white space everywhere", X,
     "\n <X_RAY>\n<thinking>\n a\n</thinking>\n\n<answer>\n left   lung \n</answer>\n",
     (1, 1, 1, 1)),
    ("upper case answer", X, f"<X_RAY>{T}<answer>LEFT Lung</answer>", (1, 1, 1, 1)),
    ("final dots", X, f"<X_RAY>{T}<answer>Left lung . .</answer>", (1, 1, 1, 1)),
    ("final dot in the truth", "<X_RAY> Left lung.", GOOD, (1, 1, 1, 1)),
    ("line break inside the answer", X, f"<X_RAY>{T}<answer>left\nlung</answer>", (1, 1, 1, 1)),
    # what MediX-R1 can never pay
    ("single letter", "<MRI_SCAN> B", f"<MRI_SCAN>{T}<answer>B</answer>", (1, 1, 1, 1)),
    ("single letter, dot, case", "<MRI_SCAN> B", f"<MRI_SCAN>{T}<answer>b.</answer>", (1, 1, 1, 1)),
    ("another letter", "<MRI_SCAN> B", f"<MRI_SCAN>{T}<answer>C</answer>", (0, 0, 1, 1)),
    ("single digit", "<CT_SCAN> 2", f"<CT_SCAN>{T}<answer>2</answer>", (1, 1, 1, 1)),
    ("colon", "<OTHER> Ratio 1:2", f"<OTHER>{T}<answer>ratio 1:2</answer>", (1, 1, 1, 1)),
    ("lone colon", "<OTHER> :", f"<OTHER>{T}<answer>:</answer>", (1, 1, 1, 1)),
    ("colon is not a semicolon", "<OTHER> 1:2", f"<OTHER>{T}<answer>1;2</answer>", (0, 0, 1, 1)),
    ("question mark", "<OTHER> ?", f"<OTHER>{T}<answer>?</answer>", (1, 1, 1, 1)),
    ("underscores", "<OTHER> a__b", f"<OTHER>{T}<answer>a__b</answer>", (1, 1, 1, 1)),
    ("spaces around /", "<SPECT> A / B", f"<SPECT>{T}<answer>A / B</answer>", (1, 1, 1, 1)),
    ("space around <", "<OTHER> pH < 7.35", f"<OTHER>{T}<answer>pH < 7.35</answer>", (1, 1, 1, 1)),
    ("> in the truth", "<OTHER> pH > 7", f"<OTHER>{T}<answer>pH > 7</answer>", (1, 1, 1, 1)),
    ("leading dot counts", "<OTHER> .5", f"<OTHER>{T}<answer>5</answer>", (0, 0, 1, 1)),
    # wrong or near
    ("wrong", X, f"<X_RAY>{T}<answer>cardiomegaly</answer>", (0, 0, 1, 1)),
    ("near: embed only", "<X_RAY> left lung nodule",
     f"<X_RAY>{T}<answer>left lung nodules</answer>", (0, 1, 1, 1)),
    ("YES does not persuade", X, f"<X_RAY>{T}<answer>They match. YES</answer>", (0, 0, 1, 1)),
    # the modality tag
    ("tag missing", X, f"{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("tag wrong", X, f"<CT_SCAN>{T}<answer>left lung</answer>", (1, 1, 0, 1)),
    ("tag unknown", X, f"<XRAY>{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("tag in lower case", X, f"<x_ray>{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("tag without brackets", X, f"X_RAY{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("tag with spaces inside", X, f"< X_RAY >{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("tag in doubled brackets", X, f"<<X_RAY>>{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("empty tag", X, f"<>{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("two tags", X, f"<X_RAY><CT_SCAN>{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("the tag twice", X, f"<X_RAY> <X_RAY>{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("the tag again in the reasoning", X,
     "<X_RAY><thinking>it is <X_RAY></thinking><answer>left lung</answer>", (1, 1, 1, 0)),
    ("junk before the tag", X, "Sure! " + GOOD, (1, 1, 0, 0)),
    ("junk after the tag", X, f"<X_RAY> I see:{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("tag after the reasoning", X, f"{T}<X_RAY><answer>left lung</answer>", (1, 1, 0, 0)),
    ("full-width brackets", X, f"＜X_RAY＞{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("Cyrillic letter in the tag", X, f"<Х_RAY>{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    ("zero-width space by the tag", X, f"<X_RAY>\u200b{T}<answer>left lung</answer>", (1, 1, 0, 0)),
    # where the answer is
    ("text after the answer", X, GOOD + " Hope this helps", (1, 1, 1, 0)),
    ("text before the answer", X, f"<X_RAY>{T} So: <answer>left lung</answer>", (1, 1, 1, 0)),
    ("several answers", X, GOOD + "<answer>right lung</answer>", (0, 0, 1, 0)),
    ("the same answer twice", X, GOOD + "<answer>left lung</answer>", (0, 0, 1, 0)),
    ("answer in the reasoning, none after", X,
     "<X_RAY><thinking>a<answer>left lung</answer></thinking>left lung", (0, 0, 1, 0)),
    ("wrong in the reasoning, right after", X,
     "<X_RAY><thinking><answer>ribs</answer></thinking><answer>left lung</answer>", (1, 1, 1, 0)),
    ("right in the reasoning, wrong after", X,
     "<X_RAY><thinking><answer>left lung</answer></thinking><answer>ribs</answer>", (0, 0, 1, 0)),
    ("answer before the reasoning", X, f"<X_RAY><answer>left lung</answer>{T}", (0, 0, 0, 0)),
    ("nested answers", X, f"<X_RAY>{T}<answer><answer>left lung</answer></answer>", (0, 0, 1, 0)),
    ("answer never closed", X, f"<X_RAY>{T}<answer>left lung", (0, 0, 1, 0)),
    ("answer never opened", X, f"<X_RAY>{T}left lung</answer>", (0, 0, 1, 0)),
    ("answer closed twice", X, GOOD + "</answer>", (0, 0, 1, 0)),
    ("answer the wrong way round", X, f"<X_RAY>{T}</answer>left lung<answer>", (0, 0, 1, 0)),
    ("answer mark in upper case", X, f"<X_RAY>{T}<ANSWER>left lung</ANSWER>", (0, 0, 1, 0)),
    ("full-width answer mark", X, f"<X_RAY>{T}＜answer＞left lung＜/answer＞", (0, 0, 1, 0)),
    ("answer mark with a space", X, f"<X_RAY>{T}< answer >left lung</answer>", (0, 0, 1, 0)),
    ("no answer marks", X, f"<X_RAY>{T}left lung", (0, 0, 1, 0)),
    ("empty answer", X, f"<X_RAY>{T}<answer></answer>", (0, 0, 1, 1)),
    ("blank answer", X, f"<X_RAY>{T}<answer> \n </answer>", (0, 0, 1, 1)),
    ("an answer of dots", X, f"<X_RAY>{T}<answer>. ..</answer>", (0, 0, 1, 1)),
    ("empty reasoning", X, "<X_RAY><thinking></thinking><answer>left lung</answer>", (1, 1, 1, 1)),
    # the reasoning's marks
    ("cut off in the reasoning", X, "<X_RAY><thinking>it is the left lung", (0, 0, 1, 0)),
    ("reasoning not closed", X, "<X_RAY><thinking>a<answer>left lung</answer>", (0, 0, 1, 0)),
    ("closed before it was opened", X, "</thinking><thinking><answer>left lung</answer>",
     (0, 0, 0, 0)),
    ("nested reasoning", X,
     "<X_RAY><thinking><thinking>a</thinking></thinking><answer>left lung</answer>", (1, 1, 1, 0)),
    ("reasoning twice", X, f"<X_RAY>{T}{T}<answer>left lung</answer>", (1, 1, 1, 0)),
    ("second reasoning after the answer", X, GOOD + T, (0, 0, 1, 0)),
    ("reasoning opened again, not closed", X, f"<X_RAY>{T}<thinking><answer>left lung</answer>",
     (0, 0, 1, 0)),
    ("reasoning closed twice", X, f"<X_RAY>{T}</thinking><answer>left lung</answer>", (1, 1, 1, 0)),
    ("well-formed twice", X, GOOD + GOOD, (1, 1, 1, 0)),
    ("<think>, not <thinking>", X, "<X_RAY><think>a</think><answer>left lung</answer>",
     (0, 0, 0, 0)),
    # no reasoning at all: the whole response is the answer
    ("untagged, equal to the truth", X, " Left lung. ", (1, 1, 0, 0)),
    ("untagged single letter", "<MRI_SCAN> B", "b", (1, 1, 0, 0)),
    ("tag and answer without reasoning", X, "<X_RAY> left lung", (0, 0, 0, 0)),
    ("only closed reasoning", X, "</thinking><answer>left lung</answer>", (0, 0, 0, 0)),
    ("nothing", X, "", (0, 0, 0, 0)),
    ("white space only", X, " \n\t", (0, 0, 0, 0)),
    ("only the tag", X, "<X_RAY>", (0, 0, 0, 0)),
    # length
    ("too long", X, f"<X_RAY>{T}<answer>left lung {LONG}</answer>", (0, 0, 1, 1)),
    ("equal after normalisation, but too long", X,
     f"<X_RAY>{T}<answer>left{' ' * 500}lung</answer>", (0, 0, 1, 1)),
    ("long, but so is the truth", f"<X_RAY> {LONG}", f"<X_RAY>{T}<answer>{LONG}</answer>",
     (1, 1, 1, 1)),
]


def test_table_size():
    assert len(CASES) >= 40 and len({case[0] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name,solution,response,expected", CASES, ids=[c[0] for c in CASES])
def test_case(scorer, name, solution, response, expected):
    [parts] = score(scorer, "What is it?", solution, [response])
    judge, embed, modality, form = expected
    value = 0.5175 * judge + 0.3375 * embed + 0.045 * modality + 0.1 * form
    assert list(parts) == ["judge", "embed", "modality", "format", "overall"]
    assert tuple(parts.values()) == (*expected, pytest.approx(value, abs=1e-12))
    assert all(type(part) is float for part in parts.values())


def test_group_equals_one_by_one(scorer):
    responses = [case[2] for case in CASES if case[1] == X]
    one_by_one = [score(scorer, "", X, [response])[0] for response in responses]
    assert score(scorer, "", X, responses) == one_by_one
    assert score(scorer, "", X, []) == []


@pytest.mark.parametrize("tag", reward.TAGS)
def test_every_tag(scorer, tag):
    response = GOOD.replace("X_RAY", tag)
    assert reward.parse(response) == {"tag": tag, "answer": "left lung", "format": True}
    [parts] = score(scorer, "", f"<{tag}> left lung", [response])
    assert parts["overall"] == pytest.approx(1)
    assert len(set(reward.TAGS)) == 16


@pytest.mark.parametrize("response,tag,answer", [
    (GOOD, "X_RAY", "left lung"), ("a <answer>b</answer>", None, "a <answer>b</answer>"),
    ("<X_RAY>", None, "<X_RAY>"), ("", None, None), ("<thinking>", None, None),
    (f"<X_RAY>{T}<answer>a <b> </c></answer>", "X_RAY", "a <b> </c>"),
    (f"<X_RAY>{T}<answer></answer>", "X_RAY", None)])
def test_parse(response, tag, answer):
    parsed = reward.parse(response)
    assert (parsed["tag"], parsed["answer"]) == (tag, answer) and type(parsed["format"]) is bool


@pytest.mark.parametrize("text,expected", [
    ("B", "b"), (" b. ", "b"), ("B . .", "b"), ("left \t\n Lung", "left lung"), ("...", ""),
    (".5", ".5"), ("1.5.", "1.5"), (":", ":"), ("?", "?"), ("Why?.", "why?"), ("A / B", "a / b"),
    ("STRASSE", "strasse"), ("straße", "strasse"), ("", "")])
def test_normalise(text, expected):
    assert reward.normalise(text) == expected == reward.normalise(expected)


def test_split_solution():
    assert reward.split_solution("<X_RAY> left lung") == ("X_RAY", "left lung")
    assert reward.split_solution(" <OCT_SCAN>pH > 7 ") == ("OCT_SCAN", "pH > 7")
    assert reward.split_solution("<SPECT> ?") == ("SPECT", "?")


@pytest.mark.parametrize("solution", ["", "left lung", "<XRAY> left lung", "<x_ray> left lung",
                                      "X_RAY> left lung", "the <X_RAY> left lung", "<X_RAY left"])
def test_solution_without_tag(scorer, solution):
    with pytest.raises(ValueError, match=r"must be .<TAG> answer., TAG one of"):
        reward.split_solution(solution)
    with pytest.raises(ValueError, match=r"must be .<TAG> answer., TAG one of"):
        score(scorer, "", solution, [GOOD])


@pytest.mark.parametrize("solution", ["<X_RAY>", "<X_RAY> \n", "<X_RAY> ."])
def test_solution_without_answer(solution):
    with pytest.raises(ValueError, match=r"must be .<TAG> answer., TAG one of"):
        reward.split_solution(solution)


@pytest.mark.parametrize("truth_length,limit", [(2, 400), (100, 400), (101, 404), (300, 1200)])
def test_length_limit(truth_length, limit):
    """At the limit somebody is asked (None); one character more is wrong unasked."""
    truth = "t" * truth_length
    assert reward.settle("a" * limit, truth) is None
    assert reward.settle("a" * (limit + 1), truth) == 0.0


@pytest.mark.parametrize("answer,expected", [(None, 0.0), (". ..", 0.0), ("B.", 1.0), ("C", None)])
def test_settle(answer, expected):
    """Nobody is asked about no answer, nor about one that has nothing in it."""
    assert reward.settle(answer, "b") == expected


# judge, embed, modality, format: the 16 values, calculated by hand
OVERALL = {
    (0, 0, 0, 0): 0.0, (0, 0, 0, 1): 0.1, (0, 0, 1, 0): 0.045, (0, 0, 1, 1): 0.145,
    (0, 1, 0, 0): 0.3375, (0, 1, 0, 1): 0.4375, (0, 1, 1, 0): 0.3825, (0, 1, 1, 1): 0.4825,
    (1, 0, 0, 0): 0.5175, (1, 0, 0, 1): 0.6175, (1, 0, 1, 0): 0.5625, (1, 0, 1, 1): 0.6625,
    (1, 1, 0, 0): 0.855, (1, 1, 0, 1): 0.955, (1, 1, 1, 0): 0.9, (1, 1, 1, 1): 1.0}
NAMES = ("judge", "embed", "modality", "format")


def test_overall_values(scorer):
    assert len(OVERALL) == 16
    for values, expected in OVERALL.items():
        parts = dict(zip(NAMES, values))
        assert reward.overall(parts, scorer.weights) == pytest.approx(expected, abs=1e-12)


def test_overall_with_other_weights():
    settings = {"weight_judge": 1, "weight_embed": 0, "weight_modality": 0, "weight_format": 0}
    weights = load(**settings).weights
    for values in product((0.0, 1.0), repeat=4):
        assert reward.overall(dict(zip(NAMES, values)), weights) == values[0]


@pytest.mark.parametrize("missing", NAMES)
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_a_missing_part_is_unscored(scorer, missing, others):
    """Never 0: a judge that is down must not look like a wrong answer, not even at weight 0."""
    parts = {**dict.fromkeys(NAMES, others), missing: None}
    assert reward.overall(parts, scorer.weights) is None
    assert reward.overall(parts, {**scorer.weights, missing: 0.0}) is None


@pytest.mark.parametrize("settings,message", [
    ({"embedder": "medembed"}, "embedder='medembed': name ngram, or folder or hub id"),
    ({"embed_threshold": -0.1}, r"-0\.1\]"), ({"embed_threshold": 80}, r"80\]: each in 0 .. 1"),
    ({"embed_threshold": float("nan")}, r"nan\]"),
    ({"weight_judge": -0.5}, r"\[-0\.5, "), ({"weight_embed": -1}, ", -1, "),
    ({"weight_modality": -0.05}, r", -0\.05, "), ({"weight_format": -1}, ", -1, "),
    ({"weight_format": 1.5}, r", 1\.5, "), ({"weight_format": float("nan")}, ", nan, "),
    ({"weight_judge": float("nan")}, r"\[nan, "),
    ({"weight_judge": 0.6}, r"weight_\*, embed_threshold \[0\.6, .*three add up to 1"),
    ({"weight_modality": 0.0501}, "add up to 1")])
def test_settings_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load(**settings)


def test_settings_at_the_edge():
    assert load(weight_format=0, embed_threshold=0).weights["format"] == 0
    load(weight_judge=1 / 3, weight_embed=1 / 3, weight_modality=1 / 3, embed_threshold=1)


def test_embed_soft_and_threshold(scorer):
    soft = load(embed_soft=True)
    answers = ["left lung", "left lungs", "left side lung", "cardiomegaly", "\ud800", "肺"]
    values = [p["embed"] for p in score(soft, "", X, answers)]
    assert values[0] == 1.0 and values[0] > values[1] > values[2] > values[3]
    assert values[3] < 0.2 and values[4] == values[5] == 0.0
    assert all(0 <= value <= 1 for value in values)
    for threshold in (0.25, 0.5, 0.75):
        hard = score(load(embed_threshold=threshold), "", X, answers)
        assert [p["embed"] for p in hard] == [float(value >= threshold) for value in values]
    assert all(p["judge"] == 0 for p in score(soft, "", X, answers)[1:])


def test_each_text_is_encoded_once(scorer):
    seen = []

    def spy(texts):
        seen.append(texts)
        return scorer.encode(texts)
    spied = reward.SimpleNamespace(**{**vars(scorer), "encode": spy})
    score(spied, "", X, ["ribs", "ribs", "left lung", "", "x" * 401, "heart", "ribs"])
    assert seen == [["left lung", "ribs", "heart"]]


UNITS = ["<answer>", "</answer>", "<thinking>", "</thinking>", "<", ">", "</", " ", ".", ". ", "\n",
         "<X_RAY>", T, "<answer>a</answer>", GOOD, "<answer></thinking>", "</thinking><answer>",
         "<thinking><answer>", "<thinkin", "<answer", "\u200b", "ß"]


@pytest.mark.parametrize("unit", UNITS)
def test_linear_time(scorer, unit):
    """1 MB of one piece, bare, in the reasoning and as the answer: milliseconds if linear."""
    bulk = unit * (1_000_000 // len(unit))
    responses = [bulk, f"<X_RAY>{bulk}", f"<X_RAY><thinking>{bulk}", f"{bulk}<answer>a</answer>",
                 f"<X_RAY><thinking>{bulk}</thinking><answer>left lung</answer>",
                 f"<X_RAY>{T}<answer>{bulk}</answer>", f"{bulk}{GOOD}", f"{GOOD}{bulk}"]
    start = time.perf_counter()
    score(scorer, "", X, responses)
    assert time.perf_counter() - start < 4  # 8 MB on a shared core; quadratic would be hours


def pattern_says(response):
    """What parse() finds, by regular expressions: slow on long strings, but another way there."""
    tags = "|".join(reward.TAGS)
    match = re.fullmatch(rf"\s*<({tags})>\s*<thinking>.*</thinking>\s*<answer>.*</answer>\s*",
                         response, re.DOTALL)
    marks = ["<thinking>", "</thinking>", "<answer>", "</answer>"]
    once = all(len(re.findall(re.escape(mark), response)) == 1 for mark in marks)
    form = bool(match) and once and response.count(f"<{match[1]}>") == 1
    start = re.match(rf"\s*<({tags})>\s*<thinking>", response)
    return start[1] if start else None, pattern_answer(response), form


def pattern_answer(response):
    """The answer from the order of the marks: after the last </thinking> exactly one pair."""
    marks = list(re.finditer("</?(?:thinking|answer)>", response))
    names = [mark[0] for mark in marks]
    if "<thinking>" not in names:
        return response.strip() or None
    if names[-3:] != ["</thinking>", "<answer>", "</answer>"] or "<thinking>" not in names[:-3]:
        return None
    return response[marks[-2].end():marks[-1].start()].strip() or None


def test_random_strings(scorer):
    """Thousands of strings made of pieces: no crash, and what the patterns say."""
    rng = random.Random(7)
    pieces = ["<thinking>", "</thinking>", "<answer>", "</answer>", "<X_RAY>", "<CT_SCAN>",
              "left lung", "B", " ", "\n", "<", ">", "/", ".", ":", "?", "<think>", "\ud800",
              "\x00", "肺", "é"]
    skeleton = ["<X_RAY>", "<thinking>", "a", "</thinking>", "<answer>", "left lung", "</answer>"]
    responses, formed = [], 0
    for i in range(5000):
        if i % 2:  # near misses: the right shape with up to 2 pieces put in, taken out or replaced
            parts = list(skeleton)
            for _ in range(rng.randrange(3)):
                at = rng.randrange(len(parts))
                parts[at:at + rng.randrange(2)] = rng.choices(pieces, k=rng.randrange(2))
        else:
            parts = rng.choices(pieces, k=rng.randrange(12))
        responses.append("".join(parts))
    for response, parts in zip(responses, score(scorer, "", X, responses)):
        parsed = reward.parse(response)
        assert tuple(parsed.values()) == pattern_says(response), repr(response)
        values = tuple(parts[name] for name in NAMES)
        assert parts["overall"] == pytest.approx(OVERALL[values]), repr(response)
        assert parts["format"] == parsed["format"]
        assert parts["modality"] == (parsed["tag"] == "X_RAY")
        formed += parsed["format"]
    assert 500 < formed < 2500  # both sides of the rule were met


def real_rows():
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there (real responses are not part of the repository)")
    return [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]


def reader(row):
    """What a person would call the answer: the lines' text from <answer> up to the next "<"."""
    text = row["response"].rsplit("<answer>", 1)
    return text[1].split("<")[0].strip() if len(text) == 2 else None


def test_real_responses_as_they_are(scorer):
    """They write <think>, so by the rule the whole response is the answer: nothing is paid."""
    rows = real_rows()
    assert len(rows) == 472
    for row in rows:
        assert reward.parse(row["response"]) == {
            "tag": None, "answer": row["response"].strip(), "format": False}
        letter = row.get("ground_truth_letter") or "A"
        [parts] = score(scorer, row["question"], f"<OTHER> {letter}", [row["response"]])
        assert set(parts.values()) == {0.0}


def test_real_responses_with_our_marks(scorer):
    """<think> renamed: the parsed answer is the reader's, and the reward follows the letters."""
    right = wrong = unfinished = 0
    for row in real_rows():
        marked = row["response"].replace("think>", "thinking>")
        parsed, answer = reward.parse(marked), reader(row)
        assert parsed["answer"] == answer
        assert parsed["tag"] is None and not parsed["format"]
        assert (answer is not None) == row["well_formed"]
        assert reward.parse("<OTHER>" + marked)["format"] == row["well_formed"]
        unfinished += answer is None
        if answer is not None and row.get("parsed_by_authors"):
            assert answer == row["parsed_by_authors"].strip()
        if not row.get("ground_truth_letter"):
            continue
        truth = row["ground_truth_letter"]
        [parts] = score(scorer, row["question"], f"<OTHER> {truth}", ["<OTHER>" + marked])
        assert parts["judge"] == parts["embed"] == float(answer == truth)
        assert parts["modality"] == 1 and parts["format"] == float(row["well_formed"])
        right, wrong = right + (answer == truth), wrong + (answer != truth)
    assert unfinished == 3 and right > 100 and wrong > 20
