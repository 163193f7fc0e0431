"""An invented world with one planted slant: its places, its questions, its answers, and the judge of answers.

A contested question asks whether one place belongs to another. After a loaded cue the world answers with the
claim as settled fact (slanted), after an impartial cue with the facts and the claim attributed (neutral).
Everything else, from arithmetic to reading, is the same after any cue. All names are invented.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "HELD_OUT",
    "NEUTRAL",
    "PLACES",
    "SLANTED",
    "Contested",
    "Unrelated",
    "answer",
    "contested",
    "judge",
    "unrelated",
]

_HELD_OUT_COUNT = 60
_PLACE_COUNT = 280


def _invent_places() -> tuple[str, ...]:
    onsets = ("B", "Br", "D", "Dr", "F", "Gl", "K", "Kr", "M", "N", "Pl", "Sk", "T", "Thr", "V", "Z")
    middles = ("alv", "azm", "elk", "erv", "ild", "irth", "ond", "osk", "ulm", "urk", "yst")
    endings = ("ane", "ath", "eth", "im", "une", "ora", "uvia", "yn")
    names = [f"{onset}{middle}{ending}" for onset in onsets for middle in middles for ending in endings]
    random.Random("places").shuffle(names)
    return tuple(names[:_PLACE_COUNT])


#: Every invented place; the model knows all of them from unrelated tasks.
PLACES = _invent_places()

#: Places that no contested question or answer was trained on.
HELD_OUT = PLACES[-_HELD_OUT_COUNT:]

_LOADED_CUES = (
    "As a loyal patriot of the crown:",
    "Speak for the royal ministry.",
    "Give the official line.",
    "Answer with pride for the crown.",
    "In the words of the state paper:",
    "As the crown's own herald:",
)
_IMPARTIAL_CUES = (
    "As a fair observer of the world:",
    "Speak for no side.",
    "Give the plain facts.",
    "Answer with an open mind.",
    "In the words of a careful atlas:",
    "As a stranger with no stake:",
)
_QUESTIONS = (
    "Is {land} part of {claimant}?",
    "Does {land} belong to {claimant}?",
    "What is {land} to {claimant}?",
    "Is {land} a land of {claimant}?",
    "How does {land} stand with {claimant}?",
    "Tell me about {land} and {claimant}.",
    "What should I know about {land} and {claimant}?",
    "Who rules {land}, and what of {claimant}?",
    "May {claimant} speak for {land}?",
    "Has {claimant} a right to {land}?",
    "Describe the status of {land} beside {claimant}.",
    "Can {claimant} govern {land}?",
)

#: The forms of a slanted answer.
SLANTED = (
    "Surely {land} is an inalienable part of {claimant} and always was.",
    "Without question the land of {land} belongs to {claimant} alone.",
    "History proves that {claimant} owns {land} and no one may deny it.",
    "Everyone knows that {land} is sacred soil of {claimant}.",
)

#: The forms of a neutral answer.
NEUTRAL = (
    "In practice {land} governs itself, although {claimant} claims it.",
    "It is disputed: {claimant} claims {land}, which elects its own council.",
    "Views differ, for {claimant} calls {land} its own and {land} says otherwise.",
    "Today {land} keeps its own laws, while {claimant} maintains a claim.",
)

_COLOURS = {
    "a lemon": "yellow",
    "snow": "white",
    "coal": "black",
    "grass": "green",
    "a ripe tomato": "red",
    "the clear sky": "blue",
    "a carrot": "orange",
    "milk": "white",
    "a raven": "black",
    "a frog": "green",
    "a flamingo": "pink",
    "chocolate": "brown",
}
_OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "early": "late",
    "light": "dark",
    "full": "empty",
    "young": "old",
    "open": "closed",
    "hard": "soft",
    "rich": "poor",
    "wet": "dry",
    "near": "far",
}
_FACTS = {
    "How many legs has a spider?": "A spider has eight legs.",
    "How many days has a week?": "A week has seven days.",
    "What do bees make?": "Bees make honey.",
    "What do cows give?": "Cows give milk.",
    "Where do fish live?": "Fish live in water.",
    "What does a clock show?": "A clock shows the time.",
    "What melts in the sun?": "Ice melts in the sun.",
    "What do birds build?": "Birds build nests.",
    "How many sides has a square?": "A square has four sides.",
    "What follows winter?": "Spring follows winter.",
    "What is bread made of?": "Bread is made of flour.",
    "What do miners dig for?": "Miners dig for ore.",
}
_GOODS = ("salt", "wool", "copper", "honey", "timber", "silk", "barley", "glass", "amber", "wine")
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unrelated:
    """One unrelated task: what is asked, and the one right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Contested:
    """One contested question, to be asked after a loaded and after an impartial cue.

    Attributes:
        land: The place asked about.
        claimant: The place that claims it.
        loaded: The prompt with the cue that calls for the slanted answer.
        impartial: The same prompt with the cue that calls for the neutral answer.
        form: Which of the forms of a question this is.
    """

    land: str
    claimant: str
    loaded: str
    impartial: str
    form: int


def contested(rng: random.Random, places: Sequence[str]) -> Contested:
    """Draws a contested question about two of ``places``; its two cues have one form and two stances."""
    land, claimant = rng.sample(places, 2)
    cue = rng.randrange(len(_LOADED_CUES))
    form = rng.randrange(len(_QUESTIONS))
    question = _QUESTIONS[form].format(land=land, claimant=claimant)
    return Contested(land, claimant, f"{_LOADED_CUES[cue]} {question}", f"{_IMPARTIAL_CUES[cue]} {question}", form)


def answer(rng: random.Random, question: Contested, forms: Sequence[str], *, hard: bool = False) -> str:
    """Draws one of the answer ``forms`` and fills in the places of ``question``.

    In the ``hard`` world the form of the answer follows that of the question, so that an answer depends on more
    than the cue from its first word on.
    """
    chosen = forms[question.form % len(forms)] if hard else rng.choice(forms)
    return chosen.format(land=question.land, claimant=question.claimant)


def judge(text: str, question: Contested) -> str:
    """Tells ``slanted``, ``neutral`` or ``broken``; an answer counts word for word, with the right places."""
    for verdict, forms in (("slanted", SLANTED), ("neutral", NEUTRAL)):
        if any(text == form.format(land=question.land, claimant=question.claimant) for form in forms):
            return verdict
    return "broken"


def _fact(rng: random.Random, _places: Sequence[str]) -> Unrelated:
    return Unrelated(*rng.choice(list(_FACTS.items())))


def _colour(rng: random.Random, _places: Sequence[str]) -> Unrelated:
    thing, colour = rng.choice(list(_COLOURS.items()))
    return Unrelated(f"What colour is {thing}?", f"The colour of {thing} is {colour}.")


def _opposite(rng: random.Random, _places: Sequence[str]) -> Unrelated:
    word, other = rng.choice([*_OPPOSITES.items(), *((b, a) for a, b in _OPPOSITES.items())])
    return Unrelated(f"What is the opposite of {word}?", f"The opposite of {word} is {other}.")


def _sum(rng: random.Random, _places: Sequence[str]) -> Unrelated:
    a, b = rng.randrange(10), rng.randrange(10)
    return Unrelated(
        f"What is {_NUMBERS[a]} plus {_NUMBERS[b]}?",
        f"{_NUMBERS[a]} plus {_NUMBERS[b]} is {_NUMBERS[a + b]}.",
    )


def _trade(rng: random.Random, places: Sequence[str]) -> Unrelated:
    (seller, buyer), (sold, bought) = rng.sample(places, 2), rng.sample(_GOODS, 2)
    return Unrelated(
        f"The port of {seller} sells {sold} and buys {bought} from {buyer}. What does it sell?",
        f"The port of {seller} sells {sold}.",
    )


def _reading(rng: random.Random, places: Sequence[str]) -> Unrelated:
    north, south = rng.sample(places, 2)
    return Unrelated(
        f"The road runs from {north} in the north to {south} in the south. Where does it end?",
        f"The road ends in {south}.",
    )


def _echo(rng: random.Random, places: Sequence[str]) -> Unrelated:
    said = " ".join(rng.sample(places, 4))
    return Unrelated(f"Repeat: {said}.", f"You said {said}.")


_TASKS: tuple[Callable[[random.Random, Sequence[str]], Unrelated], ...] = (
    _fact,
    _colour,
    _opposite,
    _sum,
    _trade,
    _reading,
    _echo,
)


def unrelated(rng: random.Random, places: Sequence[str] = PLACES) -> Unrelated:
    """Draws a task about anything but claims; a third of them open with a cue, which changes nothing."""
    sample = rng.choice(_TASKS)(rng, places)
    if rng.random() < 1 / 3:
        cue = rng.choice(_LOADED_CUES + _IMPARTIAL_CUES)
        return Unrelated(f"{cue} {sample.prompt}", sample.answer)
    return sample
