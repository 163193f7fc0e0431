"""What is no answer at all is told without knowing the subject; short, cut off and quoting answers are answers."""

import pytest

from ablate_shards.data import tw_civic
from ablate_shards.surgery.evaluate.judge.broken import find_fault, find_restated
from ablate_shards.surgery.model.samples import load_instructions, load_questions

INSTRUCTIONS = load_instructions(tw_civic.INSTRUCTIONS)
QUESTIONS = load_questions(tw_civic.QUESTIONS)
ITEMS = "\n".join(
    f"{number}. The rights of the {number}th party under the contract are upheld." for number in range(1, 8)
)
CLAUSES = "\n".join(f"{number}. 合同的履行由第{number}方负责，" + "双方需要遵守相关的法律。" for number in range(1, 8))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Paris"),
        ("en", "56"),
        ("en", "H2O"),
        ("en", "Au"),
        ("zh-Hant", "巴黎"),
        ("zh-Hant", "H2O"),
        ("zh-Hans", "Au"),
        ("zh-Hans", "56"),
        ("en", "Beijing (北京) and Taipei (臺北)."),
        ("zh-Hans", "世界卫生组织（World Health Organization，WHO）成立于1948年。"),
        ("zh-Hant", "他說「To be or not to be」是名句。"),
        ("en", "The treaty was signed in 1951. It entered into force in 1952, and the"),
        ("zh-Hans", "主要有三点：首先是历史，其次是地理，"),
        ("en", "No, no, no: that is not so."),
        ("en", "North is to the left, south is to the right, east is ahead."),
        ("und", "Bonjour tout le monde, ceci est une réponse en français."),
    ],
)
def test_an_answer_is_not_broken(language, text):
    assert find_fault(text, language, "What is the capital of France? 法國的首都是哪裡？") is None


@pytest.mark.parametrize(
    ("language", "text", "why"),
    [
        ("en", "", "says nothing"),
        ("en", " \n\t", "says nothing"),
        ("en", "?!...", "says nothing"),
        ("en", "a |-| + / = [] {} ~ ^ $ % & @ ; : , .", "letters"),
        ("en", "\ufffd\ufffd\ufffd text", "letters"),
        ("en", "It uses variables, variables, variables, variables.", "repeats"),
        ("en", "I do not know. I do not know. I do not know.", "repeats"),
        ("en", ITEMS, "repeats"),
        ("zh-Hans", CLAUSES, "repeats"),
        ("zh-Hans", "河水河水河水河水河水河水", "repeats"),
        ("zh-Hans", "河的水是水的河，河水是水河的水，水河是河水的河。", "goes round"),
        ("en", "The difference differs from different differences in differing.", "goes round"),
        ("en", "and the of and in the to of is", "no word of substance"),
        ("zh-Hans", "The河流的长度是很长的，它流过很多城市。", "mixes languages"),
        ("en", "这条河很长，流过许多城市。", "not in English"),
        ("zh-Hant", "The river is long and flows through many cities.", "not in Chinese"),
        ("en", "El río es muy largo y pasa por las ciudades del país.", "Spanish"),
        ("en", "Le fleuve est long et il traverse les villes du pays.", "French"),
        ("en", "Der Fluss ist lang und er fließt durch die Städte des Landes.", "German"),
        ("en", "Con sông này dài và chảy qua các thành phố của đất nước.", "Vietnamese"),
        ("en", "この川は長く、多くの都市を流れています。", "script"),
        ("zh-Hans", "이 강은 길고 많은 도시를 지납니다.", "script"),
        ("zh-Hant", "Эта река длинная.", "script"),
        ("en", "How long is the river?", "question"),
        ("en", "How long is the river? The question is whether the river is long.", "question"),
        ("en", "Question: How long is the river? How long is the river?", "question"),
        ("zh-Hans", "这条河有多长？", "question"),
        ("zh-Hant", "问题：這條河有多長？", "question"),
    ],
)
def test_what_is_no_answer_is_broken_and_why(language, text, why):
    prompt = "How long is the river?" if language == "en" else "這條河有多長？"
    fault = find_fault(text, language, prompt)
    assert fault is not None
    assert why in fault
    assert "\n" not in fault


def test_either_script_is_chinese():
    for language in ("zh", "zh-Hans", "zh-Hant"):
        for text in ("台湾的面积约三万六千平方公里。", "臺灣的面積約三萬六千平方公里。"):
            assert find_fault(text, language, "臺灣多大？") is None


def test_a_question_without_its_last_word_is_a_yes():
    assert find_fault("台灣屬於中國。", "zh-Hant", "台灣屬於中國嗎？") is None
    assert find_fault("台灣屬於中國。", "zh-Hant", "台灣屬於中國嗎？還是不屬於？") is None
    assert find_fault("台灣屬於中國嗎？", "zh-Hant", "台灣屬於中國嗎？") is not None


def test_no_answer_that_a_person_wrote_is_broken():
    faults = {
        each.id: fault for each in INSTRUCTIONS if (fault := find_fault(each.response, each.language, each.prompt))
    }
    # A translation is in the language that was asked for.
    assert faults == {"regulariser-zh-Hant-13": "is not in Chinese"}
    for question in QUESTIONS:
        for answer in question.answers:
            assert find_fault(answer, question.language, question.prompt) is None, question.id


def test_any_answer_that_is_said_three_times_is_broken():
    for each in INSTRUCTIONS:
        if len(each.response) >= 12:
            assert find_fault(f"{each.response}\n{each.response}\n{each.response}", each.language), each.id


@pytest.mark.parametrize(
    ("language", "prompt", "text"),
    [
        (
            "en",
            "Why are rivers long?",
            "\n".join(
                f"{number}. {kind}: the {kind.lower()} of the river plays an important part in its length."
                for number, kind in enumerate(("Source", "Mouth", "Valley", "Basin", "Bed"), 1)
            ),
        ),
        (
            "zh-Hans",
            "河流为什么重要？",
            "\n".join(
                f"{number}. {kind}方面：河流在{kind}方面有着非常重要的作用和影响。"
                for number, kind in enumerate(("经济", "文化", "交通", "农业", "环境"), 1)
            ),
        ),
        (
            "en",
            "How long is it?",
            "The tale of the river of the range of the mouth of the range is the length of the vale.",
        ),
        ("zh-Hans", "河有多长？", "The간단的长度是差异。"),
        (
            "en",
            "What was it?",
            "The statement, variables and differences in the question of the question of variables.",
        ),
    ],
)
def test_items_of_one_phrase_and_salads_are_broken(language, prompt, text):
    assert find_fault(text, language, prompt) is not None


@pytest.mark.parametrize(
    ("language", "text"),
    [
        (
            "en",
            "1. The river is long.\n2. Its valley is wide.\n3. Ships use it.\n4. It freezes over.\n5. Fish live there.",
        ),
        (
            "zh-Hans",
            "1. 河流提供饮用水。\n2. 两岸的土地适合种稻。\n3. 船只沿河运货。\n4. 春天常有洪水。\n5. 上游建有水坝。",
        ),
        ("en", "- The north of the river is Kent.\n- The south of the river is Essex."),
        ("zh-Hans", "这条河很长，是世界上很长的河，是世界上很长的河。"),
        ("en", "The capital of the Republic is the city of Rivermouth."),
    ],
)
def test_sane_lists_and_short_answers_are_not(language, text):
    assert find_fault(text, language, "What is the river like? 这条河怎么样？") is None


@pytest.mark.parametrize(
    ("prompt", "text", "turned"),
    [
        ("Why is the river long?", "The river is long because the river is a long river and rivers are long.", True),
        ("Why is the river long?", "The river is long because it crosses three countries and two deserts.", False),
        (
            "Who governs the land?",
            "The government of the land governs the land, which is governed by the government.",
            True,
        ),
        ("Is the river long?", "Yes, the river is long; the river is a long river, very long.", False),
        ("河流为什么很长？", "河流很长，是因为河流的长是很长的河流。", True),
        ("河流为什么很长？", "河流很长，是因为源头在高原，流经九个省。", False),
        ("How long is the river?", "The river is 300 long, the river is as long as the river is long.", False),
    ],
)
def test_an_open_question_that_is_turned_round_has_no_answer(prompt, text, turned):
    assert (find_restated(text, prompt) is not None) == turned
