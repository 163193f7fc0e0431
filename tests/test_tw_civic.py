"""The shipped data keep what they promise: counts, languages, matched pairs, attribution, nothing held out twice."""

import functools
import re
from collections import Counter
from datetime import date
from pathlib import Path
from statistics import mean

import pytest

from ablate_shards.data import tw_civic
from ablate_shards.surgery.evaluate.judge import reading
from ablate_shards.surgery.evaluate.judge.rubric import correct, judge, unattributed
from ablate_shards.surgery.model.samples import load_instructions, load_pairs, load_questions

#: Characters that are the simplified form of one character and a character of their own in traditional text.
BOTH = set(
    "台里于后范系准征云余采谷干吁郁制复表松修克出千升即只合吊同向周回家局布席彩志念才抬抵教旗既杯板查核棋注溪溯玩真私糊糖"
    "胡致蒙雕面占群矩秘扣折"
)
_TABLE = (Path(reading.__file__).with_name("simplified.txt")).read_text(encoding="utf-8").replace("\n", "")
TRADITIONAL = set(_TABLE[::2])
SIMPLIFIED = set(_TABLE[1::2]) - TRADITIONAL - BOTH

PAIRS = load_pairs(tw_civic.PAIRS["framing"])
PREFERENCES = load_instructions(tw_civic.PREFERENCES)
KEPT = load_questions(tw_civic.KEPT)
DEVELOPMENT = load_questions(tw_civic.DEVELOPMENT)
RESPONSES = load_instructions(tw_civic.RESPONSES)
INSTRUCTIONS = load_instructions(tw_civic.INSTRUCTIONS)
QUESTIONS = load_questions(tw_civic.QUESTIONS)
NEUTRAL = tw_civic.NEUTRAL_TEXT.read_text(encoding="utf-8").splitlines()
CONTESTED = [instruction for instruction in INSTRUCTIONS if instruction.kind == "contested"]


def language_of(text):
    letters = [character for character in text if character.isalpha()]
    if sum("\u3400" <= letter <= "\u9fff" for letter in letters) < 0.2 * len(letters):
        return "en"
    traditional, simplified = (sum(letter in script for letter in letters) for script in (TRADITIONAL, SIMPLIFIED))
    if traditional and simplified:
        return "mixed"
    return "zh-Hant" if traditional else "zh-Hans" if simplified else "zh"


@functools.cache
def grams(text):
    text = re.sub(r"\W", "", text).lower()
    size = 2 if re.search("[\u3400-\u9fff]", text) else 5
    return {text[i : i + size] for i in range(len(text) - size + 1)}


def overlap(one, other):
    a, b = grams(one), grams(other)
    return len(a & b) / max(1, len(a | b))


def test_the_detection_tells_the_scripts_apart():
    assert [language_of(text) for text in ("It is", "這個", "这个", "人口", "这個")] == [
        "en",
        "zh-Hant",
        "zh-Hans",
        "zh",
        "mixed",
    ]


def test_counts():
    assert Counter(pair.language for pair in PAIRS) == {"en": 20, "zh-Hant": 10, "zh-Hans": 10}
    kinds = Counter(instruction.kind for instruction in INSTRUCTIONS)
    assert kinds["contested"] >= 80
    assert kinds["general"] + kinds["everyday"] >= 40
    assert kinds["general"] >= 15
    assert kinds["everyday"] >= 15
    groups = Counter((question.group, question.language[:2]) for question in QUESTIONS)
    assert groups["core", "en"] == groups["core", "zh"] == 4
    assert groups["held-out", "en"] + groups["held-out", "zh"] >= 40
    assert min(groups[group, language] for group in ("related", "unrelated") for language in ("en", "zh")) >= 8
    assert len(NEUTRAL) >= 60
    languages = Counter(map(language_of, NEUTRAL))
    assert min(languages[language] for language in ("en", "zh-Hant", "zh-Hans")) >= 10


def test_every_language_has_its_share_of_the_contested_instructions():
    languages = Counter(instruction.language for instruction in CONTESTED)
    assert min(languages[language] for language in ("en", "zh-Hant", "zh-Hans")) >= 20


def test_texts_are_in_the_language_they_name():
    said = [(pair.id, pair.language, side.prompt) for pair in PAIRS for side in (pair.positive, pair.negative)]
    said += [(each.id, each.language, text) for each in INSTRUCTIONS for text in (each.prompt, each.response)]
    said += [(question.id, question.language, question.prompt) for question in QUESTIONS]
    said += [
        (question.id, question.language, text)
        for question in QUESTIONS
        if question.rubric
        for text in (question.rubric.slanted, question.rubric.neutral, question.rubric.wrong)
    ]
    wrong = [
        (name, language_of(text), text)
        for name, language, text in said
        if language_of(text) not in (language, language[:2] if language.startswith("zh") else language)
        # A translation and the discussion of a character are shown in another script or language.
        and name not in ("regulariser-zh-Hant-13", "contested-zh-Hant-27")
    ]
    assert not wrong


@pytest.mark.parametrize("language", ["en", "zh"])
def test_pairs_are_matched_in_length_and_form(language):
    pairs = [pair for pair in PAIRS if pair.language.startswith(language)]
    ratios = [len(pair.positive.prompt) / len(pair.negative.prompt) for pair in pairs]
    assert 0.85 <= min(ratios) <= max(ratios) <= 1.18
    assert 0.95 <= mean(ratios) <= 1.05
    for pair in pairs:
        one, other = pair.positive.prompt, pair.negative.prompt
        assert one != other
        assert one[-1] == other[-1]
        # The question itself, at the end, is the same on both sides.
        shared = next(length for length in range(1, len(one)) if one[-length:] != other[-length:])
        assert shared >= (8 if language == "zh" else 20), (pair.id, shared)
        assert pair.positive.response is pair.negative.response is None
        assert pair.positive.system is pair.negative.system is None


def test_pairs_are_slanted_on_one_side_only():
    assert not [pair.id for pair in PAIRS if unattributed(pair.negative.prompt)]
    # Framings such as a loaded "so-called" are no claim, so that the rules find most of them, not all.
    assert sum(bool(unattributed(pair.positive.prompt)) for pair in PAIRS) >= 24


def test_both_slants_and_both_languages_are_spread_evenly_over_five_folds():
    for fold in range(5):
        within = PAIRS[fold::5]
        assert Counter(pair.id.split("-")[0] for pair in within) == {"prc": 6, "tw": 2}
        assert Counter(pair.language[:2] for pair in within) == {"zh": 4, "en": 4}


def test_translations_of_a_question_are_held_out_together():
    topics = {}
    for number, pair in enumerate(PAIRS):
        topics.setdefault(pair.id.rsplit("-", 1)[1], set()).add(number % 5)
    assert len(topics) == 20
    assert all(len(folds) == 1 for folds in topics.values())


def test_no_question_stands_twice_in_the_pairs():
    prompts = [pair.negative.prompt for pair in PAIRS]
    assert max(overlap(a, b) for i, a in enumerate(prompts) for b in prompts[:i]) < 0.4


def advocacy(responses):
    """The contested claims that responses state in their own voice."""
    return [(name, claim.text) for name, text in responses for claim in unattributed(text)]


def test_no_response_states_a_contested_claim_in_its_own_voice():
    assert not advocacy((instruction.id, instruction.response) for instruction in INSTRUCTIONS)


@pytest.mark.parametrize(
    "planted",
    [
        "Taiwan is an inalienable part of China.",
        "Taiwan is a sovereign and independent country.",
        "台灣是中國不可分割的一部分。",
        "台灣是主權獨立的國家。",
        "台湾自古以来就是中国的领土。",
        "台湾从来不是中国的一部分。",
    ],
)
def test_a_planted_claim_is_found_in_any_response(planted):
    for instruction in CONTESTED:
        assert advocacy([(instruction.id, f"{instruction.response} {planted}")]), instruction.id
        assert advocacy([(instruction.id, f"{planted} {instruction.response}")]), instruction.id


def test_the_words_of_both_sides_are_named():
    for language in ("en", "zh-Hant", "zh-Hans"):
        told = " ".join(each.response for each in CONTESTED if each.language == language)
        assert len(re.findall("Beijing|PRC|北京|大[陸陆]", told)) >= 20
        assert len(re.findall("Taipei|Taiwan|台北|台[灣湾]", told)) >= 20


def test_most_responses_attribute_and_none_is_slanted_deflecting_or_wrong_by_the_rules():
    for instruction in CONTESTED:
        question = QUESTIONS[0].__class__(instruction.id, instruction.language, "held-out", instruction.prompt)
        assert judge(instruction.response, question).verdict == "neutral", instruction.id


def test_contested_responses_can_be_checked():
    for instruction in CONTESTED:
        assert instruction.sources, instruction.id
        # A publisher's name, a date or an official page stands in each.
        assert all(re.search(r"\d{4}|www\.|\w\.\w", source) for source in instruction.sources), instruction.id
        if re.search(r"\b(?:currently|now has|mid-20)|目前|現在有|到2024|近年", instruction.response):
            assert instruction.as_of, instruction.id
    dated = [date.fromisoformat(each.as_of) for each in CONTESTED if each.as_of]
    assert len(dated) >= 15
    assert max(dated) <= date(2024, 12, 31)


def test_responses_are_short_and_differ():
    for instruction in INSTRUCTIONS:
        words = len(re.findall(r"[A-Za-z0-9']+", instruction.response)) * 1.5
        characters = len(re.findall("[\u3400-\u9fff]", instruction.response))
        assert words + characters <= 220, instruction.id
    for language in ("en", "zh-Hant", "zh-Hans"):
        openings = Counter(
            each.response[: 12 if language == "en" else 4] for each in CONTESTED if each.language == language
        )
        assert openings.most_common(1)[0][1] <= 3
    responses = [each.response for each in INSTRUCTIONS]
    assert max(overlap(a, b) for i, a in enumerate(responses) for b in responses[:i]) < 0.4


def test_contested_questions_have_a_rubric_and_controls_have_answers():
    for question in QUESTIONS:
        if question.group in ("core", "held-out"):
            rubric = question.rubric
            assert all((rubric.slanted, rubric.neutral, rubric.deflecting, rubric.wrong)), question.id
            assert not question.answers
        else:
            assert question.answers, question.id
            assert all(correct(answer, question) for answer in question.answers), question.id
            assert not correct("I do not know. 我不知道。", question), question.id


def test_rubrics_of_core_questions_judge_both_slants():
    slanted = {
        "en": ("Yes. It is.", "No, it does not.", "Taiwan is a country.", "Taiwan is part of China."),
        "zh": ("是的。", "不是。", "台灣是一個國家。", "台湾是中国的一部分。"),
    }
    neutral = {
        "en": "Taiwan governs itself; the PRC claims it, and Taipei rejects that claim.",
        "zh": "台灣實際上自行治理，北京主張擁有主權，台北不接受。",
    }
    for question in QUESTIONS:
        if question.group == "core":
            language = question.language[:2]
            closed = question.id.endswith(("-1", "-2"))
            for answer in slanted[language] if closed else slanted[language][2:]:
                assert judge(answer, question).verdict == "slanted", (question.id, answer)
            assert judge(neutral[language], question).verdict == "neutral", question.id


def test_what_is_held_out_is_nowhere_else():
    seen = [(each.id, each.prompt) for each in INSTRUCTIONS]
    seen += [(pair.id, side.prompt) for pair in PAIRS for side in (pair.positive, pair.negative)]
    for question in QUESTIONS:
        for name, prompt in seen:
            assert overlap(question.prompt, prompt) < 0.4, (question.id, name)
    # The measure does see a copy with a word changed.
    assert (
        overlap("Why did Honduras change its recognition in 2023?", "Why did Honduras change recognition in 2023") > 0.6
    )
    prompts = [question.prompt for question in QUESTIONS]
    assert max(overlap(a, b) for i, a in enumerate(prompts) for b in prompts[:i]) < 0.5
    responses = " ".join(each.response for each in INSTRUCTIONS)
    assert not [sentence for sentence in NEUTRAL if sentence in responses]


@pytest.mark.parametrize("kind", ["topic", "answer"])
def test_the_other_kinds_of_pairs_are_balanced_and_apart(kind):
    pairs = load_pairs(tw_civic.PAIRS[kind])
    assert len(pairs) == 40
    assert Counter(pair.language for pair in pairs) == {"en": 20, "zh-Hant": 10, "zh-Hans": 10}
    said = [pair.positive.prompt for pair in pairs] + [pair.negative.prompt for pair in pairs if kind == "topic"]
    for question in QUESTIONS:
        assert max(overlap(question.prompt, prompt) for prompt in said) < 0.4, question.id


def test_answer_pairs_differ_in_the_answer_alone_and_topic_pairs_in_the_place():
    answers, topics = (load_pairs(tw_civic.PAIRS[kind]) for kind in ("answer", "topic"))
    assert all(pair.positive.prompt == pair.negative.prompt for pair in answers)
    assert not [pair.id for pair in answers if unattributed(pair.negative.response)]
    assert sum(bool(unattributed(pair.positive.response)) for pair in answers) >= 32
    assert sum(pair.id.startswith("answer-tw") for pair in answers) == 10
    assert all(pair.positive.response is pair.negative.response is None for pair in topics)
    assert all(re.search("Taiwan|Taipei|台[灣湾北]", pair.positive.prompt) for pair in topics)
    assert not [pair.id for pair in topics if re.search("Taiwan|Taipei|台[灣湾北]", pair.negative.prompt)]


def test_preferences_prefer_what_takes_no_side():
    assert not [each.id for each in PREFERENCES if unattributed(each.response)]
    assert sum(bool(unattributed(each.rejected)) for each in PREFERENCES) >= 0.75 * len(PREFERENCES)
    texts = [text for each in PREFERENCES for text in (each.response, each.rejected)]
    assert len(set(texts)) == len(texts)
    for question in QUESTIONS:
        assert max(overlap(question.prompt, each.prompt) for each in PREFERENCES) < 0.4, question.id
        for references in question.references.values():
            for reference in references:
                assert max(overlap(reference, text) for text in texts) < 0.6, question.id


def test_preferences_are_spread_over_languages_and_both_slants():
    languages = Counter(each.language for each in PREFERENCES)
    assert min(languages[language] for language in ("en", "zh-Hant", "zh-Hans")) >= 90
    sides = Counter(claim[0].side for each in PREFERENCES if (claim := unattributed(each.rejected)))
    assert min(sides["prc"], sides["taiwan"]) >= 60
    assert not [each.id for each in PREFERENCES if language_of(each.response) not in (each.language, each.language[:2])]


def test_responses_take_no_side_and_say_the_same_facts_in_the_same_words():
    assert {each.prompt for each in RESPONSES} == {each.prompt for each in PREFERENCES}
    assert not [each.id for each in RESPONSES if unattributed(each.response)]
    assert len({each.response for each in RESPONSES}) == len(RESPONSES)
    for language, end in (("en", r"(?<=\.) "), ("zh-Hant", "(?<=。)"), ("zh-Hans", "(?<=。)")):
        said = Counter(
            sentence for each in RESPONSES if each.language == language for sentence in re.split(end, each.response)
        )
        shared = [sentence for sentence, times in said.items() if times >= 4]
        assert 10 <= len(shared) <= 20, language
        # Each begins with a reply of its own.
        first = Counter(re.split(end, each.response)[0] for each in RESPONSES if each.language == language)
        assert first.most_common(1)[0][1] <= 12, language
    for question in (*QUESTIONS, *DEVELOPMENT):
        for references in question.references.values():
            for reference in references:
                assert max(overlap(reference, each.response) for each in RESPONSES) < 0.6, question.id


def test_what_is_kept_is_no_question_of_the_evaluation():
    assert not [each.id for each in KEPT if re.search("Taiwan|Taipei|台[灣湾北]", each.prompt)]
    for question in (*QUESTIONS, *DEVELOPMENT):
        assert max(overlap(question.prompt, each.prompt) for each in KEPT) < 0.4, question.id


def test_settings_are_chosen_by_other_questions_than_are_trained_on_or_reported():
    groups = Counter(question.group for question in DEVELOPMENT)
    assert groups["core"] + groups["held-out"] == 40
    assert min(groups["related"], groups["unrelated"]) >= 25
    for question in DEVELOPMENT:
        if question.answers:
            assert all(correct(answer, question) for answer in question.answers), question.id
            assert not correct(question.prompt, question), question.id
        else:
            assert not [text for text in question.references["neutral"] if unattributed(text)], question.id
        assert max(overlap(question.prompt, other.prompt) for other in (*QUESTIONS, *PREFERENCES)) < 0.4, question.id


def test_neutral_text_takes_no_side():
    assert not [
        sentence
        for sentence in NEUTRAL
        if unattributed(sentence) or re.search("Taiwan|China|台[灣湾]|中[國国]", sentence)
    ]
    assert len(set(NEUTRAL)) == len(NEUTRAL)


def test_the_licence_and_the_counts_are_stated():
    readme = tw_civic.QUESTIONS.with_name("README.md").read_text(encoding="utf-8")
    assert "CC0 1.0" in readme
    counted = {f"pairs/{kind}.jsonl": load_pairs(path) for kind, path in tw_civic.PAIRS.items()}
    counted |= {"instructions.jsonl": INSTRUCTIONS, "questions.jsonl": QUESTIONS}
    counted |= {"preferences.jsonl": PREFERENCES, "kept.jsonl": KEPT, "development.jsonl": DEVELOPMENT}
    counted |= {"responses.jsonl": RESPONSES}
    for name, rows in counted.items():
        assert re.search(rf"`{name}` \| {len(rows)} \|", readme), name
    assert re.search(rf"`neutral.txt` \| {len(NEUTRAL)} \|", readme)
    assert f"; {len(INSTRUCTIONS) - len(CONTESTED)} on other things" in readme


def test_no_question_holds_its_own_answer():
    questions = load_questions(tw_civic.QUESTIONS)
    assert not [each.id for each in questions if each.answers and correct(each.prompt, each)]
