"""Tells when a text is no answer at all, whatever it is about: empty, going in circles, garbled, an echo, foreign."""

import re
from collections import Counter
from collections.abc import Sequence

from ablate_shards.surgery.evaluate.judge.reading import HAN, content_words, either, plain, sentences

__all__ = ["find_fault", "find_restated"]

#: Words that are frequent in one language; a text in Latin script is in the one most of whose words stand in it.
_FREQUENT = {
    "English": "the of and to in is that it as was for on are with by not this be from at which an or has its have"
    " you i can cannot do does what there their but one no yes my your sorry",
    "Spanish": "el los las y que es por con para una del se como su más fue esta también pero sus está son lo al ha",
    "French": "le les et est une des du que qui dans pour par sur pas plus avec au ce cette sont il elle été ses aux",
    "German": "der die und das ist ein eine nicht mit von den dem zu auf für sich auch als wird des im sind hat wurde",
    "Portuguese": "o os e é do da uma um em não para com por dos das que se como mais foi ao são também na no",
    "Italian": "il lo gli e è di che una un per non con del della sono come da si anche dei nel più alla le ha",
    "Vietnamese": "là và của một có được không trong các cho những với này đã người về ở năm quốc đài loan đảo nước",
    "Indonesian": "yang dan di dengan untuk dari adalah ini itu tidak sebagai pada dalam oleh merupakan negara juga",
    "Dutch": "het een van en dat niet zijn op te met voor er aan ook als maar bij door naar wordt deze werd heeft",
    "Polish": "jest nie się na do że jako przez oraz od po który jak są był była tym które za dla",
    "Turkish": "ve bir bu için ile olarak olan daha çok gibi değil kadar sonra ancak ya da ülke devlet",
}
_LANGUAGE_WORDS = {language: frozenset(words.split()) for language, words in _FREQUENT.items()}
_OTHER_SCRIPT = re.compile(r"[\u0370-\u1fff\u3040-\u30ff\u31f0-\u31ff\ua000-\ud7ff]")
#: A letter of a script that is mixed with Chinese or Latin letters only where a text is garbled.
_INSERTED = re.compile(r"[\u0e00-\u0e7f\u1100-\u11ff\uac00-\ud7ff\u0400-\u04ff]")
_QUOTED = re.compile(r"\([^)]*\)|\"[^\"]*\"|《[^》]*》|\[[^\]]*\]")
#: An English function word in a Chinese sentence: names and terms stand there in English, such words do not.
_GLUED = either(
    r"(?<![a-z])(?:the|is|are|was|this|that|these|when|which|while|with|and|but|if|it|its|by|from"
    r"|as)\s?[\u3400-\u9fff]",
    r"[\u3400-\u9fff]\s?(?:the|is|are|was|this|that|these|when|which|while|with|but|if|its|from|to be)(?![a-z])",
)

#: Shares of repeated pieces from which a text goes in circles. Of 130 answers written by people the highest are 0.18
#: for the beginnings of words and 0.14 for pairs of characters; of sound answers of models, 0.38 and 0.26.
_REPEATED_WORDS = 0.4
_REPEATED_PAIRS = 0.33
_REPEATED_PHRASES = 0.5
_STEM = 5
#: The share of "the" and "of" from which a text is a salad of nouns; of sound answers the highest is 0.27.
_ARTICLES = 0.34
#: Words in a row that the items of a list share, and the share of their words in such rows from which all are one.
_RUN = 5
_ALIKE = 0.5
_UNITS = re.compile(r"[^\W\d_\u3400-\u9fff]+|\d+|[\u3400-\u9fff]")
#: What an answer adds to the words of an open question, from which it is more than the question turned round.
_NEW = 0.12
_OPEN_QUESTION = either(
    r"^\W*(?:why|how|what)\b(?!\s+(?:country|government|name|city|year|is (?:the )?(?:capital|name)))",
    r"为什么|为何|怎么|怎样|如何|什么|哪些",
)
#: A question for a name; an answer that names nothing at all is the question turned round.
_NAMING = either(r"^\W*(?:who|whose|which|what)\b", r"谁|哪")
_FILLING = frozenset("的是了在有和与及或以因为所由于而也就都被把对于这那个些一不之其们会能可要说")
#: Above these numbers a sound text comes back to its words as well, and only whole phrases count.
_MOST_WORDS = 60
_MOST_PAIRS = 60


def find_fault(answer: str, language: str, prompt: str = "") -> str | None:
    """Returns why a text is no answer, in a few words, None where it may be one.

    It is not one if it is empty or hardly has letters, goes in circles (the same words in a row, sentence by sentence,
    item by item with small changes, or in most of its phrases), mixes scripts within a sentence, only repeats the
    question, or is in another language than asked. Chinese in either script is one language. A short text, such as
    "56", "H2O" or "Au", is in any language.

    Args:
        answer: What the model said.
        language: A BCP 47 tag; the language is looked at where it is English or Chinese.
        prompt: What was asked.
    """
    text = plain(answer)
    return (
        _unreadable(text)
        or _circling(text)
        or _foreign(text, language)
        or _echoing(text, plain(prompt))
        or _salad(text, language, plain(prompt))
    )


def _unreadable(text: str) -> str | None:
    written = sum(character.isalnum() for character in text)
    if not written:
        return "says nothing"
    if text.count("\N{REPLACEMENT CHARACTER}") > 2 or (
        len(text) > 12 and written < 0.5 * sum(not character.isspace() for character in text)
    ):
        return "is hardly made of letters"
    return None


def _circling(text: str) -> str | None:
    if found := (
        re.search(r"(.{2,100}?)\1{4,}", text, re.DOTALL)
        or re.search(r"\b(\w[^\n]{9,120}?)(?:\1){2}", text)
        or re.search(r"([\u3400-\u9fff][^\n]{3,80}?)(?:[,、。;\s]*\1){2}", text)
    ):
        return f"repeats: {_short(found[1])}"
    said = [sentence.text[sentence.own :] for sentence in sentences(text)]
    often = Counter(each for each in said if len(each) >= 8).most_common(1)
    if often and often[0][1] >= 3:
        return f"repeats: {_short(often[0][0])}"
    if varied := _variations(said) or _variations(re.split(r"[,;:.、。!?\n]+", text)):
        return f"repeats with small changes: {_short(varied)}"
    tokens = _UNITS.findall(text.casefold())
    phrases = [tuple(tokens[at : at + 6]) for at in range(len(tokens) - 5)]
    if len(phrases) >= 24 and 1 - len(set(phrases)) / len(phrases) >= _REPEATED_PHRASES:
        return f"repeats: {_short(_most_common(phrases))}"
    return _listing(text)


def _listing(text: str) -> str | None:
    """Returns what most items of a list say alike, if that is most of what they say."""
    lines = [line for line in text.split("\n") if re.match(r"\s*(?:[-•·+]|\(?\d{1,2}[.)、])\s*\S", line)]
    items = [tuple(_UNITS.findall(line.casefold())) for line in lines]
    # Of four items that are much alike, each may still say something.
    needed = _ALIKE if len(items) >= 5 else 0.85
    if len(items) < 4:
        return None
    runs = [{item[at : at + _RUN] for at in range(len(item) - _RUN + 1)} for item in items]
    shared = Counter(run for each in runs for run in each)
    often = {run for run, count in shared.items() if count >= max(3, 0.5 * len(items))}
    covered = 0
    for item in items:
        seen = [False] * len(item)
        for at in range(len(item) - _RUN + 1):
            if item[at : at + _RUN] in often:
                seen[at : at + _RUN] = [True] * _RUN
        covered += sum(seen)
    if covered < needed * sum(map(len, items)):
        return None
    return f"repeats with small changes: {_short(lines[1])}"


def _variations(parts: Sequence[str]) -> str | None:
    """Returns a part that most others follow with few words changed, if that happens again and again."""
    taken = [(part.strip(), _tokens(part)) for part in parts]
    taken = [(part, tokens) for part, tokens in taken if len(tokens) >= 3]
    alike = [
        part
        for number, (part, tokens) in enumerate(taken)
        if any(len(tokens & other) > 0.75 * len(tokens | other) for _, other in taken[max(0, number - 2) : number])
    ]
    return alike[0] if len(alike) >= 4 and len(alike) >= 0.5 * len(taken) else None


def _tokens(part: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W\d_\u3400-\u9fff]+|[\u3400-\u9fff]", part.casefold()))


def _most_common(phrases: Sequence[tuple[str, ...]]) -> str:
    phrase = Counter(phrases).most_common(1)[0][0]
    return ("" if HAN.match(phrase[0]) else " ").join(phrase)


def _foreign(text: str, language: str) -> str | None:
    if not language.startswith(("en", "zh")):
        return None
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return None
    if re.search(rf"[\w]{_INSERTED.pattern}|{_INSERTED.pattern}[^\W\d_]", _QUOTED.sub(" ", text)):
        return "mixes scripts within a word"
    if len(_OTHER_SCRIPT.findall(text)) > 0.15 * len(letters):
        return "is in another script than asked"
    # Names and terms in brackets and quotation marks may be in any language.
    bare = _QUOTED.sub(" ", text)
    bare = bare if any(map(str.isalpha, bare)) else text
    latin = sum(len(word) for word in re.findall(r"[^\W\d_\u3400-\u9fff]+", bare))
    han = len(HAN.findall(bare))
    if language.startswith("zh") and latin >= 12 and han < 0.25 * (latin / 3 + han):
        return "is not in Chinese"
    if language.startswith("en") and han >= 4 and han > 0.2 * (latin / 3 + han):
        return "is not in English"
    words = re.findall(r"[^\W\d_\u3400-\u9fff]+", bare.casefold())
    if language.startswith("en") and len(words) >= 6:
        counts = {name: sum(word in frequent for word in words) for name, frequent in _LANGUAGE_WORDS.items()}
        likely = max(counts, key=lambda name: counts[name])
        if counts[likely] > counts["English"] and counts[likely] >= 0.15 * len(words):
            return f"is in {likely}, not in English"
    return None


def _echoing(text: str, prompt: str) -> str | None:
    said, asked = (re.sub(r"\W+", "", each.casefold()) for each in (text, prompt))
    # In Chinese, a question without its last word is an answer: yes.
    if f"{said}吗" in asked:
        return None
    if len(asked) < 6 or len(said) < 0.6 * len(asked):
        return None
    rest = re.sub(r"^(?:question|answer|q|a|问题|问|答|回答)+", "", said.replace(asked, ""))
    if said in asked or len(rest) < 0.15 * len(asked):
        return "only repeats the question"
    words, known = content_words(text), content_words(prompt)
    if asked in said and re.search(r"\bwhether\b|是否", text) and len(words - known - {"question", "问题"}) < 2:
        return "only repeats the question"
    # A question in return, in the words of the question.
    asks = all(each.text.rstrip("\"') ").endswith("?") for each in sentences(text))
    return "only repeats the question" if asks and words and len(words & known) >= 0.75 * len(words) else None


def find_restated(text: str, prompt: str) -> str | None:
    """Returns why a plain text is no answer to an open question: it only turns its words round; None where it may be.

    A yes, a no and a figure are answers in the words of the question, and so is a claim: look for those before.
    """
    share = _NEW if _OPEN_QUESTION.search(prompt) else 0 if _NAMING.search(prompt) else -1
    if share < 0 or set(re.findall(r"\d+", text)) - set(re.findall(r"\d+", prompt)):
        return None
    if HAN.search(prompt):
        known, said = set(prompt), [each for each in HAN.findall(text) if each not in _FILLING]
    else:
        known = {word[:_STEM] for word in content_words(prompt)}
        said = [word[:_STEM] for word in re.findall(r"[a-z]+", text.casefold()) if content_words(word)]
    # What shares little with the question is another matter.
    if len(said) < 6 or len(known & set(said)) < 0.5 * len(set(said)):
        return None
    return "only turns the question round" if sum(each not in known for each in said) <= share * len(said) else None


def _salad(text: str, language: str, prompt: str) -> str | None:
    bare = _QUOTED.sub(" ", text)
    if language.startswith("zh") and (mixed := _GLUED.search(bare)):
        return f"mixes languages: {mixed[0]}"
    if language.startswith("en") and (
        mixed := re.search(r"(?:[A-Za-z]{2,}[\u3400-\u9fff]|[\u3400-\u9fff][a-z]{2,})+", bare)
    ):
        return f"mixes languages: {mixed[0]}"
    words = re.findall(r"[a-z]+", text.casefold())
    if len(words) >= 8 and not HAN.search(text) and not content_words(text):
        return "has no word of substance"
    if len(words) >= 16 and not HAN.search(text) and words.count("the") + words.count("of") >= _ARTICLES * len(words):
        return "is mostly articles"
    asked = {word[:_STEM] for word in re.findall(r"[a-z]+", prompt.casefold())}
    stems = [word[:_STEM] for word in words if len(word) > 3 and content_words(word) and word[:_STEM] not in asked]
    repeated = 1 - len(set(stems)) / max(1, len(stems))
    often = Counter(stems).most_common(1)
    # Few words that have nothing to do with the question are not expected to come back either; figures are.
    lost = len(stems) <= 6 and not {word[:_STEM] for word in content_words(text)} & asked and not re.search(r"\d", text)
    if often and len(stems) <= 10 and often[0][1] >= (2 if lost and asked else 3):
        return f"goes round a few words: {often[0][0]}…"
    alike = [stem for stem, count in Counter(stems).items() if count >= 2 and stem not in ("china", "taiwa")]
    if len(stems) <= 14 and asked and not {*stems} & asked and len(alike) >= 3 and len({*stems}) < 0.7 * len(stems):
        return f"goes round a few words: {alike[0]}…"
    if 3 <= len(stems) <= _MOST_WORDS and repeated >= (_REPEATED_WORDS if len(stems) >= 9 else 0.5):
        return f"goes round a few words: {Counter(stems).most_common(1)[0][0]}…"
    # A clause that is said twice says what it says.
    parts = re.split(r"[,。;!?\n]+", text)
    said = [part for at, part in enumerate(parts) if len(part) < 8 or part not in parts[:at]]
    clauses = [part for part in said if len(part) < 8 or not any(part != each and part in each for each in said)]
    pairs = [
        run[at : at + 2] for run in re.findall(r"[\u3400-\u9fff]+", "\n".join(clauses)) for at in range(len(run) - 1)
    ]
    own = [pair for pair in pairs if pair not in prompt]
    if len(pairs) <= 12 and own and (most := Counter(own).most_common(1)[0])[1] >= 3:
        return f"goes round a few words: {most[0]}"
    if 8 <= len(pairs) <= _MOST_PAIRS and 1 - len(set(pairs)) / len(pairs) >= _REPEATED_PAIRS:
        return f"goes round a few words: {Counter(pairs).most_common(1)[0][0]}"
    return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]}…"
