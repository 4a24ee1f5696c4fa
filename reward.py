"""The four-part reward of an open-ended medical answer: judge, embed, modality, format.

    response: <X_RAY><thinking> why </thinking><answer> left lung </answer>
    solution: <X_RAY> left lung

A response is the policy's text, hence hostile: parsing is strict, takes linear time and never
raises, and what is wrong with one part never costs another."""
from types import SimpleNamespace

TAGS = ("X_RAY", "MICROSCOPY", "CLINICAL_PHOTOGRAPHY", "CT_SCAN", "GRAPHICS", "ANGIOGRAPHY",
        "PET_SCAN", "ULTRASOUND", "MRI_SCAN", "FUNDUS_PHOTOGRAPHY", "OCT_SCAN", "ENDOSCOPY",
        "MAMMOGRAPHY", "FLUOROSCOPY", "OTHER", "SPECT")
MARKS = ("<thinking>", "</thinking>", "<answer>", "</answer>")


def tag_name(text):
    """The modality if text is exactly one of the 16 <TAG>s, white space around allowed, or None."""
    text = text.strip()
    name = text[1:-1]
    return name if text == f"<{name}>" and name in TAGS else None


def split_solution(solution):
    """Turn `<X_RAY> left lung` into ("X_RAY", "left lung"). ValueError: no valid tag or answer."""
    head, closed, answer = solution.partition(">")
    tag, answer = tag_name(head + closed), answer.strip()
    if tag is None:
        raise ValueError(f"solution {solution[:80]!r} must start with a tag: one of {TAGS}")
    if not normalise(answer):
        raise ValueError(f"solution {solution[:80]!r} needs an answer after <{tag}>")
    return tag, answer


def normalise(text):
    """Case-folded, white space collapsed, final dots (and the space before them) removed."""
    # MediX-R1 minds case, and drops leading dots (".5") and spaces around / ("A / B").
    return " ".join(text.casefold().split()).rstrip(" .")


def find_answer(response):
    """The one <answer> after the last </thinking>, stripped; None if there is none or several."""
    # MediX-R1 takes the first <answer>, even inside the reasoning: guesses there would then pay.
    if "<thinking>" not in response:
        return response.strip() or None
    after = response.rpartition("</thinking>")[2]  # all of it if there is no </thinking>
    if "<thinking>" in after:  # never closed, or opened once more
        return None
    answer, closed, _ = after.partition("<answer>")[2].partition("</answer>")
    one = closed and after.count("<answer>") == 1 and after.count("</answer>") == 1
    return (one and answer.strip()) or None


def parse(response):
    """Any str -> dict(tag: a name of TAGS or None, answer: str or None, format: bool)."""
    head, opened, _ = response.partition("<thinking>")
    tag = tag_name(head) if opened else None
    # MediX-R1 accepts any text before <thinking>, several answers and junk between them. Here, with
    # a tag first and each mark there once, the two ends of the rest fix the order.
    after = response.partition("</thinking>")[2].strip()
    once = all(response.count(mark) == 1 for mark in (f"<{tag}>", *MARKS))
    form = tag and once and after.startswith("<answer>") and after.endswith("</answer>")
    return {"tag": tag, "answer": find_answer(response), "format": bool(form)}


def load(cfg):
    """Settings (attributes of cfg) -> the scorer of score(). ValueError says what to change."""
    if cfg.judge != "exact":
        raise ValueError(f'judge={cfg.judge!r} is unknown: set judge="exact"')
    if cfg.embedder != "ngram":
        raise ValueError(f'embedder={cfg.embedder!r} is unknown: set embedder="ngram"')
    weights = {k: getattr(cfg, f"weight_{k}") for k in ("judge", "embed", "modality", "format")}
    for name in (*(f"weight_{k}" for k in weights), "embed_threshold"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"{name}={getattr(cfg, name)}: set it within 0 .. 1")
    if abs(sum(weights.values()) - weights["format"] - 1) > 1e-6:
        raise ValueError(f"weight_judge, weight_embed and weight_modality of {weights} must add up "
                         "to 1 (weight_format is apart), or a perfect response would not get 1")
    return SimpleNamespace(encode=ngram_encoder(), embed_threshold=cfg.embed_threshold,
                           embed_soft=cfg.embed_soft, weights=weights)


def ngram_encoder():
    """A function from a list of N texts to sparse rows (N, 2**18) of length 1: dot = cosine."""
    from sklearn.feature_extraction.text import HashingVectorizer  # only this embedder needs it
    return HashingVectorizer(  # a lone surrogate is a legal str that the hasher cannot take
        preprocessor=lambda text: normalise(text).encode("utf-8", "replace").decode(),
        analyzer="char_wb", ngram_range=(2, 4), n_features=2**18, alternate_sign=False).transform


def similarities(scorer, truth, answers):
    """The embed part of each answer: 0.0 or 1.0, or with embed_soft the cosine itself."""
    vectors = scorer.encode([truth, *answers])
    cosines = (vectors[1:] @ vectors[:1].T).toarray().ravel().clip(0, 1)
    parts = cosines if scorer.embed_soft else cosines >= scorer.embed_threshold
    return parts.astype(float).tolist()


def settle(answer, truth):
    """0.0 or 1.0 where nobody has to be asked whether the answer is right, else None."""
    # MediX-R1 has no limit: a long answer can list everything, or sway a judge.
    if answer is None or len(answer) > max(400, 4 * len(truth)) or not normalise(answer):
        return 0.0
    # MediX-R1 pays 0 for one character, `:`, `?` and `__`, though truths may be just that.
    return 1.0 if normalise(answer) == normalise(truth) else None


def overall(parts, weights):
    """The weighted reward, 0 .. 1. None (unscored) if any part is None: never 0 in its place."""
    if any(parts[name] is None for name in weights):
        return None
    correct = sum(weights[name] * parts[name] for name in ("judge", "embed", "modality"))
    return (1 - weights["format"]) * correct + weights["format"] * parts["format"]


def score(scorer, question, solution, responses):
    """One group -> for each response a dict(judge, embed, modality, format, overall) of floats.
    The exact judge does not read the question. ValueError: the solution is not `<TAG> answer`."""
    true_tag, truth = split_solution(solution)
    parsed = [parse(response) for response in responses]
    settled = [settle(p["answer"], truth) for p in parsed]
    asked = list(dict.fromkeys(p["answer"] for p, s in zip(parsed, settled) if s is None))
    judged = dict.fromkeys(asked, 0.0)  # judge="exact": what is not equal is wrong
    embedded = dict(zip(asked, similarities(scorer, truth, asked) if asked else []))
    rows = [{"judge": judged[p["answer"]] if known is None else known,
             "embed": embedded[p["answer"]] if known is None else known,
             "modality": float(p["tag"] == true_tag), "format": float(p["format"])}
            for p, known in zip(parsed, settled)]
    return [{**parts, "overall": overall(parts, scorer.weights)} for parts in rows]
